"""Initializers with several users: each use gets what it needs, equal needs share one tensor."""

import dataclasses
from pathlib import Path

import exports
import hand_decoder
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hand_decoder import HIDDEN, Spec
from rotating import check_equivalent, request, rotate

from quarot_onnx.io import model_io
from quarot_onnx.rotation.apply import apply_plan
from quarot_onnx.rotation.plan import RotationRequest, plan_rotation
from quarot_onnx.sites.detect import detect
from quarot_onnx.sites.model import Kind, OnlinePair


def initializers(path: Path) -> dict[str, np.ndarray]:
    model = model_io.load(path)
    return {name: model_io.read_array(v.const_value) for name, v in model.graph.initializers.items() if v.const_value}


@pytest.mark.parametrize("table", ["tied", "tied transposed", "two copies"])
def test_a_tied_table_becomes_two(table: str, tmp_path: Path) -> None:
    source = hand_decoder.write(tmp_path, Spec(table=table))
    target, sites, _ = rotate(source, tmp_path, request(Kind.R1, seed=4))
    assert sites.tied == (table != "two copies")
    original = initializers(source)["table"]
    embedding, head = detect(model_io.load(target)).embeddings[0], detect(model_io.load(target)).head[0]
    assert embedding.table.value.name != head.weight.value.name
    assert embedding.table.shape == head.weight.shape[::-1] == tuple(sorted(original.shape, reverse=True))
    check_equivalent(source, target)


@pytest.mark.parametrize(
    "build",
    [
        lambda: exports.optimum_export("llama", tied=True),
        lambda: exports.dynamo_export("llama", tied=True),
        exports.genai_like,
    ],
    ids=["optimum", "dynamo", "genai"],
)
def test_r4_alone_leaves_a_tied_table_tied(build, tmp_path: Path) -> None:
    target, _, _ = rotate(build(), tmp_path, request(Kind.R4))
    assert detect(model_io.load(target)).tied


@pytest.mark.parametrize("gamma", ["shared", "ones", "used elsewhere", "offset", "offset cast"])
def test_gammas(gamma: str, tmp_path: Path) -> None:
    source = hand_decoder.write(tmp_path, Spec(gamma=gamma))
    before = initializers(source)
    target, _, _ = rotate(source, tmp_path, request(Kind.R1))
    check_equivalent(source, target)
    after = initializers(target)
    sites = detect(model_io.load(target))
    values = {site.norm.gamma.value.name for site in sites.norms if site.norm.gamma is not None}
    assert len(values) == 1
    np.testing.assert_array_equal(after[str(values.pop())], np.ones(HIDDEN))
    if gamma == "used elsewhere":
        np.testing.assert_array_equal(after["g_n0"], before["g_n0"])


def test_gammas_of_ones_merged_through_identity(tmp_path: Path) -> None:
    """TorchScript keeps one of several equal initializers and hands it on through Identity."""
    source = hand_decoder.write(tmp_path, Spec(gamma="ones"))
    assert sum(node.op_type == "Identity" for node in model_io.load(source).graph) == 4
    target, _, _ = rotate(source, tmp_path)
    assert sum(node.op_type == "Identity" for node in model_io.load(target).graph) == 1


def test_equal_biases_merged_through_identity(tmp_path: Path) -> None:
    """Biases of a reader (kept), of V (R2) and of a writer (R1) that happen to be equal and are one initializer."""
    model = model_io.load(hand_decoder.write(tmp_path, Spec(linear="bias")))
    graph = model.graph
    shared = graph.initializers["b_v"]
    for name in ("b_k",):
        old = graph.initializers[name]
        alias = ir.Node("", "Identity", [shared], name=f"{name}_alias")
        alias.outputs[0].name = f"{name}_alias"
        graph.insert_before(graph[0], alias)
        old.replace_all_uses_with(alias.outputs[0])
        del graph.initializers[name]
    source = tmp_path / "shared" / "model.onnx"
    model_io.save(model, source)
    kept = initializers(source)["b_v"]
    target, _, _ = rotate(source, tmp_path)
    check_equivalent(source, target)
    np.testing.assert_array_equal(initializers(target)["b_v"], kept)
    assert any(
        np.abs(array - kept).max() > 0 for name, array in initializers(target).items() if name.startswith("b_v_")
    )


@pytest.mark.parametrize("gamma", ["vectors", "shared"])
def test_a_weight_of_two_linears_is_untied_only_where_recipes_differ(gamma: str, tmp_path: Path) -> None:
    source = hand_decoder.write(tmp_path, Spec(mlps=2, shared_mlp=True, gamma=gamma))
    assert {"W_mlp_up", "W_mlp_gate", "W_mlp_down"} <= initializers(source).keys()
    target, _, _ = rotate(source, tmp_path, request(seed=2))
    check_equivalent(source, target)
    copies = {
        part: sum(name.startswith(f"W_mlp_{part}") for name in initializers(target)) for part in ("up", "gate", "down")
    }
    # Each reader folds its own norm's γ; the down projections' recipes are equal.
    each = 1 if gamma == "shared" else 2
    assert copies == {"up": each, "gate": each, "down": 1}


def test_linears_that_share_an_input_share_its_rotation_in_any_order(tmp_path: Path) -> None:
    source = hand_decoder.write(tmp_path)
    model = model_io.load(source)
    found = detect(model)
    readers = found.norms[1].readers
    pairs = tuple(OnlinePair(linear) for linear in reversed(readers))
    plan = plan_rotation(dataclasses.replace(found, online_pairs=pairs), RotationRequest({}))
    apply_plan(model, plan)
    added = [node for node in model.graph if node.name and "/pair/" in node.name]
    assert [node.op_type for node in added] == ["MatMul"]
    target = tmp_path / "pairs" / "model.onnx"
    model_io.save(model, target)
    onnx.checker.check_model(target)  # onnxruntime does not mind nodes out of order
    check_equivalent(source, target)
