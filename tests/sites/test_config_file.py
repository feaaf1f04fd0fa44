"""Our own dialect: written and read back, patterns, sizes, what to leave out, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import exports
import onnx_ir as ir
import pytest

from quarot_onnx.errors import ConfigError, ModelError
from quarot_onnx.graph.linear import linear_at
from quarot_onnx.rotation_config.config_file import Dialect, as_config, read_sites, write_config
from quarot_onnx.sites.detect import Survey, detect
from quarot_onnx.sites.model import Kind, Sites

OWN = {"format": "quarot_onnx/1"}
ALL = frozenset(Kind)


def picture(sites: Sites) -> dict[str, Any]:
    """Everything in ``sites`` but the reasons, as names."""
    return {
        "embeddings": [e.name for e in sites.embeddings],
        "norms": [
            ([p.name for p in s.previous], s.norm.name, s.norm.gamma_offset, [r.name for r in s.readers])
            for s in sites.norms
        ],
        "writers": [w.name for w in sites.writers],
        "r2": [(a.name, a.value.name, a.value_start, a.output.name) for a in sites.r2 if a.value and a.output],
        "r3": [(a.name, a.heads.query and a.heads.query.name) for a in sites.r3 if a.heads],
        "heads": [(a.num_heads, a.num_kv_heads, a.head_dim) for a in sites.attentions],
        "mlps": [m.name for m in sites.mlps],
        "rest": (sites.layers, sites.hidden_size, sites.tied, sites.architecture, [h.name for h in sites.head]),
    }


EXPORTS = {
    "optimum": lambda: exports.optimum_export("llama"),
    "optimum tied": lambda: exports.optimum_export("llama", tied=True),
    "optimum biases": lambda: exports.optimum_export("qwen2"),
    "optimum merged": lambda: exports.optimum_export("phi3"),
    "optimum without R1": lambda: exports.optimum_export("gemma3_text"),
    "optimum with LayerNorm": lambda: exports.optimum_export("gpt_neox"),
    "dynamo": lambda: exports.dynamo_export("llama"),
    "dynamo merged": lambda: exports.dynamo_export("phi3"),
    "dynamo fused": exports.opset23_module_export,
    "genai": exports.genai_like,
    "genai unpacked": lambda: exports.genai_like(qk_norm=True),
}


@pytest.fixture(scope="module")
def optimum() -> ir.Model:
    return ir.load(exports.optimum_export("llama"))


@pytest.mark.parametrize("export", EXPORTS)
def test_what_is_written_reads_back_as_the_same_sites(export: str, tmp_path: Path) -> None:
    model = ir.load(EXPORTS[export]())
    found = detect(model)
    write_config(found, tmp_path / "rotation_config.json")
    named = read_sites(tmp_path / "rotation_config.json", Survey(model))
    assert picture(named.sites) == picture(found)
    assert named.kinds == {kind for kind, count in found.counts().items() if count}
    assert named.dialect is Dialect.OWN
    assert json.loads((tmp_path / "rotation_config.json").read_text()) == as_config(found)


def test_block_sizes_are_written_and_read(optimum: ir.Model) -> None:
    config = as_config(detect(optimum), {Kind.R1: 16, Kind.R4: 32})
    assert read_sites(config, Survey(optimum)).block_sizes == {Kind.R1: 16, Kind.R4: 32}


def test_yaml_is_read_too(optimum: ir.Model, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("format: quarot_onnx/1\nR1: detect\n")
    assert read_sites(tmp_path / "config.yaml", Survey(optimum)).sites.counts() == {"R1": 5, "R2": 0, "R3": 0, "R4": 0}


def test_nodes_without_names_are_called_by_their_outputs() -> None:
    model = ir.load(exports.optimum_export("llama"))
    expected = picture(detect(model))
    names = {node.name: node.outputs[0].name for node in model.graph}
    for node in model.graph:
        node.name = "same"
    config = as_config(detect(model))
    assert config["R4"][0]["node"] == names["/model/layers.0/mlp/down_proj/MatMul"]
    sites = read_sites(config, Survey(model)).sites
    assert sites.counts() == {"R1": 5, "R2": 2, "R3": 2, "R4": 2}
    assert len(sites.mlps) == len(expected["mlps"])


def test_a_name_of_many_nodes_is_refused() -> None:
    model = ir.load(exports.optimum_export("llama"))
    for node in model.graph:
        node.name = "same"
    with pytest.raises(ConfigError, match=r"online_pairs\[0\]\.node: \d+ nodes are named 'same'; call .* by its first"):
        read_sites({**OWN, "online_pairs": ["same"]}, Survey(model))


def test_a_node_that_cannot_be_called_is_refused() -> None:
    model = ir.load(exports.optimum_export("llama"))
    down = detect(model).mlps[0].node
    down.name = ""
    next(node for node in model.graph if node is not down).name = down.outputs[0].name
    with pytest.raises(ConfigError, match="has no name of its own and neither has its first output"):
        as_config(detect(model))


def test_kinds_that_are_not_stated_have_no_places(optimum: ir.Model) -> None:
    named = read_sites({**OWN, "R2": "detect"}, Survey(optimum))
    assert named.sites.counts() == {"R1": 0, "R2": 2, "R3": 0, "R4": 0}
    assert named.kinds == {Kind.R2}


def test_kinds_that_are_asked_for_go_where_detection_finds_them(optimum: ir.Model) -> None:
    named = read_sites({**OWN, "R2": "detect"}, Survey(optimum), asked=frozenset({Kind.R3, Kind.R4}))
    assert named.sites.counts() == {"R1": 0, "R2": 2, "R3": 2, "R4": 2}
    assert named.kinds == {Kind.R2}


def test_r1_with_a_block_size_and_no_pairs_is_detected(optimum: ir.Model) -> None:
    named = read_sites({**OWN, "R1": {"block_size": 16, "hidden_size": 64}}, Survey(optimum))
    assert named.sites.counts()["R1"] == 5
    assert named.block_sizes == {Kind.R1: 16}


def test_listed_places_are_all(optimum: ir.Model) -> None:
    config = as_config(detect(optimum))
    for kind in ("R2", "R3", "R4"):
        config[kind] = config[kind][1:]
    sites = read_sites(config, Survey(optimum)).sites
    assert sites.counts() == {"R1": 5, "R2": 1, "R3": 1, "R4": 1}
    assert sites.mlps[0].name == "/model/layers.1/mlp/down_proj/MatMul"
    assert [a.value is None for a in sites.attentions] == [True, False]


def test_what_is_left_out_is_reported(optimum: ir.Model) -> None:
    softmax, down = "/model/layers.0/self_attn/Softmax", "/model/layers.{last}/mlp/down_proj/MatMul"
    config = {**OWN, "R2": "detect", "R4": "detect", "leave_out": {"R2": [softmax], "R4": [down]}}
    sites = read_sites(config, Survey(optimum)).sites
    assert [a.name for a in sites.r2] == ["/model/layers.1/self_attn/Softmax"]
    assert [m.name for m in sites.mlps] == ["/model/layers.0/mlp/down_proj/MatMul"]
    assert [(e.kind, e.node) for e in sites.left_out] == [
        (Kind.R2, softmax),
        (Kind.R4, "/model/layers.1/mlp/down_proj/MatMul"),
    ]


def test_detection_s_reasons_stay_with_the_kinds_that_it_is_to_find() -> None:
    model = ir.load(exports.optimum_export("gemma3_text"))
    assert list(read_sites({**OWN, "R1": "detect"}, Survey(model)).sites.why_not(Kind.R1))
    assert not read_sites({**OWN, "R2": "detect"}, Survey(model)).sites.left_out


MATMUL = "/model/layers.0/mlp/down_proj/MatMul"
R2 = {
    "attention": "/model/layers.0/self_attn/Softmax",
    "value": "/model/layers.0/self_attn/v_proj/MatMul",
    "output": "/model/layers.0/self_attn/o_proj/MatMul",
}
WRONG = {
    "unknown key": ({"R5": "detect"}, "unknown key 'R5' (did you mean 'R4'?)"),
    "unknown inner key": (
        {"R2": [{**R2, "heads": 4}]},
        "R2[0]: unknown key 'heads' (did you mean 'num_heads'?)",
    ),
    "R1 off": ({"R1": False}, 'R1=False: not understood; give "detect" or {"pairs": [...]}, or leave the key out'),
    "misspelt detect": ({"R1": "detct"}, "R1='detct': not understood (did you mean 'detect'?)"),
    "misspelt detect in a list's place": ({"R4": "detct"}, "not understood (did you mean 'detect'?)"),
    "empty list": ({"R2": []}, "R2=[]: an empty list"),
    "wrong format": ({"format": "quarot_onnx/2"}, "Input should be 'quarot_onnx/1'"),
    "missing node": (
        {"R4": ["/model/layers.0/mlp/down_prj/MatMul"]},
        f"R4[0].node: the model has no node '/model/layers.0/mlp/down_prj/MatMul' (did you mean '{MATMUL}'?)",
    ),
    "no Linear": (
        {"R4": ["/model/layers.0/mlp/Mul"]},
        "R4[0].node: node '/model/layers.0/mlp/Mul' is no Linear: it is a Mul, not a MatMul or Gemm",
    ),
    "no constant weight": (
        {"online_pairs": ["/model/layers.0/self_attn/MatMul_1"]},
        "the second input of this MatMul is not a constant float matrix",
    ),
    "not R4's place": (
        {"R4": ["/lm_head/MatMul"]},
        "'/lm_head/MatMul' is no down projection of the decoder",
    ),
    "another Linear in R4's place": (
        {"R4": [MATMUL.replace("down", "up")]},
        f"is no down projection of the decoder (did you mean '{MATMUL}'?)",
    ),
    "wrong size": ({"R4": [{"node": MATMUL, "size": 64}]}, f"R4[0].size is 64, but '{MATMUL}' has 96 inputs"),
    "wrong hidden size": (
        {"R1": {"hidden_size": 4096}},
        "R1.hidden_size is 4096, but the residual stream has 64",
    ),
    "wrong head_dim": (
        {"R3": [{"attention": R2["attention"], "head_dim": 64}]},
        "R3[0].head_dim is 64, but the heads have 32",
    ),
    "wrong KV heads": ({"R2": [{**R2, "num_kv_heads": 4}]}, "R2[0].num_kv_heads is 4, but the graph has 2"),
    "wrong start": ({"R2": [{**R2, "value_start": 64}]}, "R2[0].value_start is 64, but the graph has 0"),
    "wrong value": (
        {"R2": [{**R2, "value": "/model/layers.0/self_attn/k_proj/MatMul"}]},
        (
            "R2[0].value: '/model/layers.0/self_attn/k_proj/MatMul' is named, but "
            "'/model/layers.0/self_attn/v_proj/MatMul' makes the values of"
        ),
    ),
    "no attention": ({"R2": [{**R2, "attention": MATMUL}]}, "is a MatMul, neither a Softmax nor a fused attention"),
    "no attention for R3": ({"R3": [{"attention": MATMUL}]}, "R3 cannot go to"),
    "named twice": (
        {"R4": [MATMUL, MATMUL]},
        f"R4[1]: node '{MATMUL}' is already named at R4[0]; name it once",
    ),
    "block that does not divide": (
        {"online_pairs": [{"node": MATMUL, "block_size": 36}]},
        "block_size is 36, which does not divide the size 96",
    ),
    "R1's block that does not divide": (
        {"R1": {"block_size": 48}},
        "R1.block_size is 48, which does not divide the size 64",
    ),
    "two block sizes": (
        {"R4": [{"node": MATMUL, "block_size": 32}, MATMUL.replace("0", "1")]},
        "R4[1].block_size is None",
    ),
    "leaving out of a list": (
        {"R4": [MATMUL], "leave_out": {"R4": [MATMUL]}},
        'leave_out.R4 is for "R4": "detect"',
    ),
    "leaving out what is not there": (
        {"R4": "detect", "leave_out": {"R4": ["/lm_head/MatMul"]}},
        "leave_out.R4[0]: '/lm_head/MatMul' is no down projection",
    ),
    "leaving out no attention": (
        {"R2": "detect", "leave_out": {"R2": [MATMUL]}},
        "leave_out.R2[0]: '/model/layers.0/mlp/down_proj/MatMul' is no attention of the decoder",
    ),
    "layers that are not there": (
        {"R4": ["/model/layer.{layer}/mlp/down_proj/MatMul"]},
        f"asks for '/model/layer.0/mlp/down_proj/MatMul', which the model has not (did you mean '{MATMUL}'?)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_faults_are_named(case: str, optimum: ir.Model) -> None:
    content, message = WRONG[case]
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_sites({**OWN, **content}, Survey(optimum))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("rotation config: ")


def test_the_file_is_named(optimum: ir.Model, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"format": "quarot_onnx/1", "R4": ["nowhere"]}')
    with pytest.raises(ConfigError, match=re.escape(f"{path}: R4[0].node: the model has no node 'nowhere'")):
        read_sites(path, Survey(optimum))


def test_a_pattern_must_exist_for_every_layer() -> None:
    model = ir.load(exports.optimum_export("llama"))
    pattern = "/model/layers.{layer}/mlp/down_proj/MatMul"
    assert len(read_sites({**OWN, "online_pairs": [pattern]}, Survey(model)).sites.online_pairs) == 2
    two = {**OWN, "online_pairs": [pattern, "/model/layers.{layer}/mlp/up_proj/MatMul"]}
    up = next(node for node in model.graph if node.name == "/model/layers.1/mlp/up_proj/MatMul")
    up.name = "elsewhere"
    with pytest.raises(ConfigError, match=r"exists for 1 layers, but '.*down_proj/MatMul' \(online_pairs\[0\]"):
        read_sites(two, Survey(model))
    up.name = "/model/layers.3/mlp/up_proj/MatMul"
    with pytest.raises(ConfigError, match="exists for layer 3, but not for layer 1"):
        read_sites(two, Survey(model))


def test_the_next_layer_and_the_last() -> None:
    model = ir.load(exports.optimum_export("llama"))
    names = ["/model/layers.{layer}/mlp/down_proj/MatMul", "/model/layers.{layer+1}/mlp/up_proj/MatMul"]
    pairs = read_sites({**OWN, "online_pairs": [*names, "/model/layers.{last}/mlp/gate_proj/MatMul"]}, Survey(model))
    assert [pair.linear.name[len("/model/layers.") :] for pair in pairs.sites.online_pairs] == [
        "0/mlp/down_proj/MatMul",
        "1/mlp/down_proj/MatMul",
        "1/mlp/up_proj/MatMul",
        "1/mlp/gate_proj/MatMul",
    ]


def test_places_that_detection_does_not_see_need_their_sizes() -> None:
    model = ir.load(exports.optimum_export("gpt_neox"))
    base = "/gpt_neox/layers.0/attention"
    entry = {
        "attention": f"{base}/Softmax",
        "value": f"{base}/query_key_value/MatMul",
        "output": f"{base}/dense/MatMul",
    }
    with pytest.raises(ConfigError, match=r"R2\[0\]\.value_start is missing, and the graph does not show it"):
        read_sites({**OWN, "R2": [entry]}, Survey(model))
    with pytest.raises(ConfigError, match=r"has 192 columns, fewer than 144 \+ 64"):
        read_sites({**OWN, "R2": [{**entry, "value_start": 144}]}, Survey(model))
    sites = read_sites({**OWN, "R2": [{**entry, "value_start": 128}]}, Survey(model)).sites
    assert sites.counts()["R2"] == 1
    assert (sites.r2[0].value_start, sites.r2[0].value_stop) == (128, 192)


@pytest.mark.parametrize("content", [{"R4": []}, {"R1_pair": []}, {"r1": "detect"}])
def test_no_known_dialect(content: dict[str, Any], optimum: ir.Model) -> None:
    with pytest.raises(
        ConfigError, match=r"the key '[Rr].*' is of no known dialect.*quarot_onnx by format; AMD Quark ONNX"
    ):
        read_sites(content, Survey(optimum))


def test_no_keys_at_all(optimum: ir.Model) -> None:
    with pytest.raises(ConfigError, match=r"it has no keys; one tells the dialect, quarot_onnx by format"):
        read_sites({}, Survey(optimum))


def test_the_nearest_dialect_is_named(optimum: ir.Model) -> None:
    with pytest.raises(ConfigError, match="did you mean 'R1_pairs'"):
        read_sites({"R1_pair": []}, Survey(optimum))


def test_a_key_given_twice_is_refused(optimum: ir.Model, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"format": "quarot_onnx/1", "R1": "detect", "R1": "detect"}')
    with pytest.raises(ConfigError, match="given twice"):
        read_sites(tmp_path / "r.json", Survey(optimum))


def test_a_quantized_graph_is_refused() -> None:
    model = ir.load(exports.optimum_export("llama"))
    node = next(node for node in model.graph if linear_at(node))
    node.op_type = "MatMulNBits"
    for content in ({**OWN, "R1": "detect"}, {**OWN, "online_pairs": [MATMUL]}):
        with pytest.raises(ModelError, match="already quantized"):
            read_sites(content, Survey(model))
