"""AMD Quark ONNX's R1_pairs: the whole residual stream or an error that says what is missing; and online pairs."""

import copy
import re
from typing import Any

import exports
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from quarot_onnx.errors import ConfigError
from quarot_onnx.rotation.apply import apply_plan
from quarot_onnx.rotation.plan import Demand, RotationRequest, plan_rotation
from quarot_onnx.rotation_config.config_file import Dialect, read_sites
from quarot_onnx.sites.detect import Survey, detect
from quarot_onnx.sites.model import Kind

EXPORTS = {
    "optimum": lambda: exports.optimum_export("llama"),
    "optimum biases": lambda: exports.optimum_export("qwen2"),
    "optimum merged": lambda: exports.optimum_export("phi3"),
    "dynamo": lambda: exports.dynamo_export("llama"),
    "dynamo fused": exports.opset23_module_export,
    "genai": exports.genai_like,
}


def pairs_of(model: ir.Model, *, norms: bool = True) -> dict[str, Any]:
    """What a user of Quark would write."""
    pairs = []
    for site in detect(model).norms:
        pair = {"prev_nodes": [p.name for p in site.previous], "next_nodes": [r.name for r in site.readers]}
        pairs.append({**pair, "norm_node": site.norm.name} if norms else pair)
    return {"R1_pairs": pairs}


@pytest.fixture(scope="module")
def optimum() -> ir.Model:
    return ir.load(exports.optimum_export("llama"))


@pytest.fixture
def pairs(optimum: ir.Model) -> dict[str, Any]:
    return pairs_of(optimum)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("export", EXPORTS)
def test_pairs_mean_r1_and_nothing_else(export: str, *, norms: bool) -> None:
    model = ir.load(EXPORTS[export]())
    named = read_sites(pairs_of(model, norms=norms), Survey(model))
    assert named.sites.counts() == {"R1": 5, "R2": 0, "R3": 0, "R4": 0}
    assert (named.kinds, named.dialect, named.notes) == ({Kind.R1}, Dialect.QUARK_ONNX, ())
    asked = read_sites(pairs_of(model, norms=norms), Survey(model), asked=frozenset({Kind.R2, Kind.R4}))
    assert asked.sites.counts() == {"R1": 5, "R2": 2, "R3": 0, "R4": 2}


def test_any_node_of_a_norm_stands_for_it(optimum: ir.Model, pairs: dict[str, Any]) -> None:
    scope = "/model/layers.0/input_layernorm/"
    nodes = [node.name for node in optimum.graph if node.name.startswith(scope) and node.op_type != "Constant"]
    assert len(nodes) >= 7
    for node in nodes:
        pairs["R1_pairs"][0]["norm_node"] = node
        assert read_sites(pairs, Survey(optimum)).sites.norms[0].norm.name == f"{scope}Mul_1"


def test_everything_left_out_is_listed(optimum: ir.Model, pairs: dict[str, Any]) -> None:
    del pairs["R1_pairs"][0]["next_nodes"][1:]
    with pytest.raises(ConfigError) as caught:
        read_sites(pairs, Survey(optimum))
    assert str(caught.value) == (
        "rotation config: R1_pairs leaves out /model/layers.0/self_attn/k_proj/MatMul, which reads the same residual "
        "stream; leaves out /model/layers.0/self_attn/v_proj/MatMul, which reads the same residual stream; "
        "R1 must cover the whole residual stream"
    )
    del pairs["R1_pairs"][1:]
    with pytest.raises(ConfigError, match=r"\(and \d+ more\); R1 must cover"):
        read_sites(pairs, Survey(optimum))


def test_a_writer_left_out_is_named(optimum: ir.Model, pairs: dict[str, Any]) -> None:
    pairs["R1_pairs"][0]["prev_nodes"] = ["/model/layers.0/mlp/up_proj/MatMul"]
    pairs["R1_pairs"][1]["next_nodes"] = ["/model/layers.0/mlp/gate_proj/MatMul"]
    with pytest.raises(ConfigError) as caught:
        read_sites(pairs, Survey(optimum))
    assert "leaves out /model/embed_tokens/Gather, which writes to the residual stream" in str(caught.value)
    assert "names /model/layers.0/mlp/up_proj/MatMul on the wrong side of" in str(caught.value)


def test_a_norm_in_the_wrong_pair_is_named(optimum: ir.Model, pairs: dict[str, Any]) -> None:
    first, second = pairs["R1_pairs"][:2]
    first["norm_node"], second["norm_node"] = second["norm_node"], first["norm_node"]
    with pytest.raises(
        ConfigError, match=r"puts /model/embed_tokens/Gather with .*post_attention_layernorm/Mul_1, but"
    ):
        read_sites(pairs, Survey(optimum))


def _change(pairs: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    changed = copy.deepcopy(pairs)
    changed["R1_pairs"][0][key] = value
    return changed


WRONG = {
    "missing node": (
        ("prev_nodes", ["/model/embed_token/Gather"]),
        (
            "R1_pairs[0].prev_nodes[0]: the model has no node '/model/embed_token/Gather' "
            "(did you mean '/model/embed_tokens/Gather'?)"
        ),
    ),
    "other Gather": (
        ("prev_nodes", ["/model/layers.0/self_attn/Gather"]),
        "R1_pairs[0].prev_nodes[0]: Gather '/model/layers.0/self_attn/Gather' is no embedding: it does not gather from",
    ),
    "no Linear": (("next_nodes", ["/model/layers.0/mlp/Mul"]), "is no Linear: it is a Mul"),
    "no norm": (
        ("norm_node", "/model/layers.0/mlp/Mul"),
        "R1_pairs[0].norm_node: node '/model/layers.0/mlp/Mul' (Mul) is no part of an RMSNorm",
    ),
    "misspelt norm": (
        ("norm_node", "/model/layers.0/input_layernorm/Mull_1"),
        "(did you mean '/model/layers.0/input_layernorm/Mul_1'?)",
    ),
    "named twice": (
        ("next_nodes", ["/model/layers.0/mlp/up_proj/MatMul"]),
        "R1_pairs[1].next_nodes[1]: node '/model/layers.0/mlp/up_proj/MatMul' is already named at R1_pairs[0].next",
    ),
    "unknown key": (("norm_nodes", "x"), "R1_pairs[0]: unknown key 'norm_nodes' (did you mean 'norm_node'?)"),
    "nothing to read it": (("next_nodes", []), "R1_pairs[0].next_nodes=[]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_faults_are_named(case: str, optimum: ir.Model, pairs: dict[str, Any]) -> None:
    change, message = WRONG[case]
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_sites(_change(pairs, *change), Survey(optimum))
    assert "\n" not in str(caught.value)


def test_readers_of_two_norms_need_their_norms_named(optimum: ir.Model) -> None:
    pairs = pairs_of(optimum, norms=False)
    pairs["R1_pairs"][0]["next_nodes"].append("/lm_head/MatMul")
    with pytest.raises(ConfigError, match=r"'/lm_head/MatMul' reads the norm /model/norm/Mul_1, but .*q_proj"):
        read_sites(pairs, Survey(optimum))


def _bare_stream(hidden: int = 8, rows: int = 8) -> ir.Model:
    """Linear, RMSNorm, Linear: R1 is possible, but nothing here is a decoder."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 23]>
        net (float[n, 4] x) => (float[n, 6] y) {
            s = MatMul(x, w_in)
            t = RMSNormalization<axis = -1>(s, gamma)
            y = MatMul(t, w_out)
        }""")
    for name, shape in {"w_in": (4, hidden), "gamma": (hidden,), "w_out": (rows, 6)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return ir.from_proto(model)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def test_where_detection_understands_nothing_the_file_is_followed() -> None:
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    expected = run(_bare_stream(), x)
    model = _bare_stream()
    named = read_sites({"R1_pairs": [{"prev_nodes": ["s"], "next_nodes": ["y"]}]}, Survey(model))
    assert named.sites.counts()["R1"] == 1
    assert named.sites.hidden_size == 8
    assert "R1 follows the rotation config alone" in named.notes[0]
    before = model.graph.initializers["w_in"].const_value.numpy().copy()
    apply_plan(model, plan_rotation(named.sites, RotationRequest({Kind.R1: Demand.REQUIRED})))
    assert not np.allclose(before, model.graph.initializers["w_in"].const_value.numpy())
    # float32: three products of at most 8 terms of order one
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-5, atol=1e-5)


def test_sizes_are_checked_where_detection_understands_nothing() -> None:
    with pytest.raises(ConfigError, match=r"R1_pairs\[0\]\.next_nodes\[0\]: 'y' has size 16, but 's' 8"):
        read_sites(
            {"R1_pairs": [{"prev_nodes": ["s"], "norm_node": "t", "next_nodes": ["y"]}]}, Survey(_bare_stream(8, 16))
        )


def test_online_pairs_go_into_any_graph() -> None:
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    expected = run(_bare_stream(), x)
    model = _bare_stream()
    nodes = [{"node": "y", "size": 8, "block_size": 4}, "s"]
    named = read_sites({"format": "quarot_onnx/1", "online_pairs": nodes}, Survey(model))
    assert (named.kinds, named.sites.layers) == (frozenset(), 0)
    assert [(p.linear.node.outputs[0].name, p.block_size) for p in named.sites.online_pairs] == [("y", 4), ("s", None)]
    count = len(model.graph)
    apply_plan(model, plan_rotation(named.sites, RotationRequest({})))
    assert len(model.graph) > count
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-5, atol=1e-5)
