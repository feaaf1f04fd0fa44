"""Rotated exports compute what the originals do, in prefill and decode, and were really rotated."""

from pathlib import Path

import exports
import numpy as np
import onnx
import onnxruntime
import pytest
from rotating import check_equivalent, request, rotate
from scipy.stats import ortho_group

from quarot_onnx.graph.linear import linears
from quarot_onnx.graph.tags import is_online
from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.io import model_io
from quarot_onnx.rotation.plan import Demand
from quarot_onnx.sites.detect import detect
from quarot_onnx.sites.model import Kind

O, G, EXPORTS = exports.optimum_export, exports.genai_like, exports.EXPORTS  # noqa: E741


def weights(path: Path) -> dict[str, np.ndarray]:
    """Weights of the Linears by node name, [in, out]."""
    model = model_io.load(path)
    return {
        linear.name: array.T if linear.weight.transposed else array
        for linear in linears(model.graph)
        for array in [model_io.read_array(linear.weight.tensor)]
    }


@pytest.mark.parametrize("case", EXPORTS)
def test_all_rotations_change_the_weights_and_neither_logits_nor_sites(case: str, tmp_path: Path) -> None:
    source = EXPORTS[case]()
    target, sites, plan = rotate(source, tmp_path)
    check_equivalent(source, target)
    assert dict(plan.counts) == {kind: count for kind, count in sites.counts().items() if count}
    again = detect(model_io.load(target))
    assert (again.counts(), again.left_out) == (sites.counts(), sites.left_out)
    assert (again.hidden_size, again.architecture) == (sites.hidden_size, sites.architecture)
    before, after = weights(source), weights(target)
    assert before.keys() == after.keys()
    rotated = set(before) if sites.norms else {linear.name for linear in sites.mlps}
    assert all(np.abs(after[name] - before[name]).max() > 0.01 * np.abs(before[name]).max() for name in rotated)


@pytest.mark.parametrize("case", ["optimum llama", "dynamo cache 23", "genai", "genai RoPE outside"])
def test_the_file_stays_a_valid_model_of_its_opset(case: str, tmp_path: Path) -> None:
    source = EXPORTS[case]()
    target, _, _ = rotate(source, tmp_path)
    if "SimplifiedLayerNormalization" not in {node.op_type for node in onnx.load(source).graph.node}:
        onnx.checker.check_model(target)  # it does not know onnxruntime's additions to the standard domain
    onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    before, after = onnx.load(source, load_external_data=False), onnx.load(target, load_external_data=False)
    assert before.ir_version == after.ir_version
    assert sorted((o.domain, o.version) for o in before.opset_import) == sorted(
        (o.domain, o.version) for o in after.opset_import
    )
    assert [v.name for v in before.graph.input] == [v.name for v in after.graph.input]
    assert [v.name for v in before.graph.output] == [v.name for v in after.graph.output]


SUBSETS = [{Kind.R1}, {Kind.R2}, {Kind.R3}, {Kind.R4}, {Kind.R1, Kind.R2}, {Kind.R2, Kind.R3}, {Kind.R1, Kind.R4}]


@pytest.mark.parametrize("kinds", SUBSETS, ids=lambda kinds: "+".join(sorted(kinds)))
@pytest.mark.parametrize("case", ["optimum qwen2", "dynamo cache", "genai packed bias", "opset 23 operators"])
def test_each_rotation_for_itself(case: str, kinds: set[Kind], tmp_path: Path) -> None:
    source = EXPORTS[case]()
    target, _, plan = rotate(source, tmp_path, request(*kinds))
    assert set(plan.counts) == kinds
    check_equivalent(source, target)


@pytest.mark.parametrize("case", ["optimum llama", "genai"])
def test_given_and_block_diagonal_rotations(case: str, tmp_path: Path) -> None:
    source = EXPORTS[case]()
    dense = {
        name: Rotation.dense(ortho_group.rvs(size, random_state=size), origin=name)
        for name, size in (("r1", 64), ("r2", 32))
    }
    target, _, plan = rotate(source, tmp_path / "dense", request(**dense))
    assert plan.rotations["R1"] is dense["r1"]
    check_equivalent(source, target)
    blocks = request(seed=5, block_sizes={Kind.R1: 16, Kind.R4: 12})
    target, _, plan = rotate(source, tmp_path / "blocks", blocks)
    assert (plan.rotations["R1"].block_size, plan.rotations["R4[96/12]"].block_size) == (16, 12)
    check_equivalent(source, target)


def test_seeds_give_different_models_and_are_reproducible(tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    made = [
        weights(rotate(source, tmp_path / str(number), request(Kind.R1, seed=seed))[0])
        for number, seed in enumerate((None, 0, 0, 1))
    ]
    name = "/model/layers.0/mlp/up_proj/MatMul"
    np.testing.assert_array_equal(made[1][name], made[2][name])
    assert all(np.abs(made[1][name] - made[other][name]).max() > 0.01 for other in (0, 3))


def test_online_nodes_are_tagged_and_share_their_factors(tmp_path: Path) -> None:
    source = exports.optimum_export("qwen2")
    target, _, _ = rotate(source, tmp_path, request(demand=Demand.IF_POSSIBLE))
    model = model_io.load(target)
    original = {node.name for node in model_io.load(source).graph}
    added = [node for node in model.graph if node.name not in original]
    assert added
    assert all(map(is_online, added))
    assert not any(is_online(node) for node in model.graph if node.name in original)
    products = [node for node in added if node.op_type == "MatMul"]
    factors = {v.name for node in products for v in node.inputs if v is not None and v.is_initializer()}
    # In each of two blocks Q and K take a product with the matrix of order 16, the MLP one with that of order 296.
    assert len(products) == 2 * 2 + 2
    assert len(factors) == 2


@pytest.mark.parametrize("case", ["optimum fp16", "genai fp16"])
def test_float16_weights_stay_normal_numbers(case: str, tmp_path: Path) -> None:
    target, _, _ = rotate(EXPORTS[case](), tmp_path, request(Kind.R4))
    model = model_io.load(target)
    tiny = np.finfo(np.float16).smallest_normal
    for linear in detect(model).mlps:
        weight = model_io.read_array(linear.weight.tensor)
        # A normal distribution of scale 0.1 has 0.05 % of its values below 6e-5.
        assert np.mean(np.abs(weight) < tiny) < 0.005
    outputs = [v for node in model.graph if is_online(node) for v in node.inputs if v is not None and v.const_value]
    assert all(v.const_value.dtype.name in ("FLOAT16", "INT64") for v in outputs if v.const_value is not None)
