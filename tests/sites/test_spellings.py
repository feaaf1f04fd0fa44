"""The spellings of Linears, norms, tables and attentions that exporters may choose, one at a time."""

from pathlib import Path

import exports
import hand_decoder
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hand_decoder import Spec
from onnx import TensorProto, helper, numpy_helper
from rotating import check_equivalent, request, rotate

from quarot_onnx.errors import ModelError
from quarot_onnx.io import model_io
from quarot_onnx.rotation.plan import Demand, plan_rotation
from quarot_onnx.sites.detect import detect
from quarot_onnx.sites.model import Kind, Sites

ALIKE = {
    **{f"linear {how}": Spec(linear=how) for how in hand_decoder.SPELLINGS},
    **{f"table {how}": Spec(table=how) for how in ("tied", "tied transposed", "two copies")},
    **{f"gamma {how}": Spec(gamma=how) for how in ("shared", "ones", "used elsewhere", "offset", "offset cast")},
    **{f"norm {how}": Spec(norm=how) for how in ("pow div", "mul reciprocal", "pow -0.5", "merged")},
    "two norms of one value": Spec(parallel=True),
    "two norms of one value, merged up to γ": Spec(parallel=True, norm="merged"),
    "two norms of one value with one γ": Spec(parallel=True, norm="merged", gamma="shared"),
    **{f"last token by {how}": Spec(last_token=how) for how in ("slice", "gather")},
    **{f"attention {how}": Spec(attention=how) for how in ("repeated", "tiled", "mha", "interleaved")},
    "multipliers": Spec(multipliers=True),
    "computed scale": Spec(computed_scale=True),
    "softcap": Spec(softcap=True),
    "unnamed": Spec(unnamed=True),
    "offset of a spelt norm": Spec(gamma="offset cast", norm="pow div"),
}


def found(folder: Path, spec: Spec) -> Sites:
    return detect(model_io.load(hand_decoder.write(folder, spec)))


@pytest.mark.parametrize("case", ALIKE)
def test_every_spelling_is_found_and_rotates(case: str, tmp_path: Path) -> None:
    source = hand_decoder.write(tmp_path, ALIKE[case])
    target, sites, _ = rotate(source, tmp_path)
    assert sites.counts() == {"R1": 3, "R2": 1, "R3": 1, "R4": 1}
    assert not sites.left_out
    assert sites.tied == (ALIKE[case].table.startswith("tied"))
    kv_heads = hand_decoder.HEADS if ALIKE[case].attention == "mha" else hand_decoder.KV_HEADS
    assert (sites.attentions[0].num_kv_heads, sites.attentions[0].head_dim) == (kv_heads, hand_decoder.HEAD_DIM)
    check_equivalent(source, target)


# spec, what is left out, and words of the reason
LEFT_OUT = {
    "hidden states": (Spec(outputs="hidden"), {Kind.R1}, "the residual stream is itself an output"),
    "last hidden state": (Spec(outputs="normed"), {Kind.R1}, "a norm of the residual stream is itself an output"),
    "writer's output": (Spec(outputs="written"), {Kind.R1}, "is used elsewhere too"),
    "writer's reader": (Spec(down_reader=True), {Kind.R1}, "is used elsewhere too"),
    "values": (Spec(outputs="value"), {Kind.R2}, "V leaves the graph as 'v_out', which comes back by no input"),
    "norm behind the table": (Spec(first_norm="rms"), {Kind.R1}, "is normed right behind the embedding"),
    "spelt norm behind the table": (Spec(first_norm="rms", norm="pow div"), {Kind.R1}, "right behind the embedding"),
    "LayerNorm behind the table": (Spec(first_norm="layer"), {Kind.R1}, "is normed right behind the embedding"),
    "norm behind a tied table": (Spec(first_norm="rms", table="tied"), {Kind.R1}, "right behind the embedding"),
    "LayerScale": (Spec(layer_scale=True), {Kind.R1}, "channel by channel (LayerScale)"),
    "biased MHA": (Spec(attention="mha bias"), {Kind.R2, Kind.R3}, "adds biases to Q, K and V inside"),
    "gated attention": (Spec(attention="gated"), {Kind.R2}, "stands node_gated_context (Mul)"),
    "two readers": (Spec(attention="forked"), {Kind.R2}, "the attention's result has 2 users"),
    "shared cache": (Spec(attention="shared cache"), {Kind.R2, Kind.R3}, "is used by node_context"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_cannot_be_rotated_is_left_out_with_a_reason(case: str, tmp_path: Path) -> None:
    spec, kinds, words = LEFT_OUT[case]
    source = hand_decoder.write(tmp_path, spec)
    target, sites, plan = rotate(source, tmp_path)
    assert {entry.kind for entry in sites.left_out} == kinds
    assert all(words in entry.reason for entry in sites.left_out)
    assert {kind for kind in Kind if not sites.counts()[kind]} == kinds
    assert {Kind(note.split()[0]) for note in plan.notes} == kinds
    assert len(plan.notes) == len({(entry.kind, entry.reason) for entry in sites.left_out}), "a line for each reason"
    if not spec.down_reader:
        check_equivalent(source, target)


def test_a_head_is_what_makes_the_logits(tmp_path: Path) -> None:
    """Behind a LayerNorm, where other Linears are as wide as a table is long."""
    sites = found(tmp_path, Spec(first_norm="layer", intermediate=hand_decoder.VOCAB))
    assert [linear.name for linear in sites.head] == ["node_head_out"]


@pytest.mark.parametrize("attention", ["gated", "forked"])
def test_an_output_linear_that_could_not_be_traced_is_no_mlp(attention: str, tmp_path: Path) -> None:
    assert [linear.name for linear in found(tmp_path, Spec(attention=attention)).mlps] == ["node_mlp0_down_out"]


def choice(then: list[onnx.NodeProto], otherwise: list[onnx.NodeProto], output: str) -> onnx.NodeProto:
    """An If node whose branches end in the values ``then_<output>`` and ``else_<output>``."""
    branches = {
        f"{name}_branch": helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info(f"{name}_{output}", TensorProto.FLOAT, None)]
        )
        for name, nodes in (("then", then), ("else", otherwise))
    }
    return helper.make_node("If", ["condition"], [output], name="optimum::if", **branches)


def with_condition(model: onnx.ModelProto, folder: Path) -> ir.Model:
    model.graph.input.append(helper.make_tensor_value_info("condition", TensorProto.BOOL, [1]))
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")
    return model_io.load(folder / "model.onnx")


def test_a_subgraph_that_reads_the_stream_forbids_r1(tmp_path: Path) -> None:
    model = hand_decoder.build()
    then, otherwise = (
        [helper.make_node("Identity", ["x1"], [f"{name}_norm"], name=f"{name}_reads")] for name in ("then", "else")
    )
    model.graph.node.append(choice(then, otherwise, "norm"))
    sites = detect(with_condition(model, tmp_path))
    assert sites.counts()["R1"] == 0
    assert {(entry.node, entry.reason) for entry in sites.left_out} == {
        ("then_reads", "reads the residual stream inside a subgraph"),
        ("else_reads", "reads the residual stream inside a subgraph"),
    }


def test_merged_decoders_in_an_if_are_refused(tmp_path: Path) -> None:
    model = hand_decoder.build()
    outer = {"input_ids", *(tensor.name for tensor in model.graph.initializer)}
    bodies = []
    for name in ("then", "else"):
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
        for node in nodes:
            node.input[:] = [i if i in outer else f"{name}_{i}" for i in node.input]
            node.output[:] = [f"{name}_{o}" for o in node.output]
        bodies.append(nodes)
    del model.graph.node[:]
    model.graph.node.append(choice(*bodies, "logits"))
    with pytest.raises(ModelError, match=r"inside the If node 'optimum::if'; .*--no-post-process"):
        detect(with_condition(model, tmp_path))


@pytest.mark.parametrize("op_type", ["DequantizeLinear", "MatMulNBits", "DynamicQuantizeLinear"])
def test_a_quantized_graph_is_refused(op_type: str, tmp_path: Path) -> None:
    model = model_io.load(hand_decoder.write(tmp_path))
    model.graph.append(ir.Node("", op_type, [model.graph.inputs[0]], name="quantized_node"))
    with pytest.raises(ModelError, match=f"already quantized: node 'quantized_node' is a {op_type}"):
        detect(model)


def test_a_graph_without_attention_is_no_decoder(tmp_path: Path) -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 4]))
    weight = ir.Value(name="w", const_value=ir.tensor([[1.0] * 3] * 4), shape=ir.Shape([4, 3]))
    node = ir.Node("", "MatMul", [x, weight], name="linear")
    model = ir.Model(
        ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 20}), ir_version=10
    )
    node.outputs[0].name = "y"
    sites = detect(model)
    assert (sites.layers, sites.hidden_size, sites.architecture) == (0, 0, "not a decoder")
    assert set(sites.counts().values()) == {0}


def test_a_linear_inside_an_if_is_no_reason_to_refuse_a_decoder_outside(tmp_path: Path) -> None:
    model = hand_decoder.build()
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[list(last.output).index("logits")] = "raw"
    weight = np.eye(hand_decoder.VOCAB, dtype=np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "twice"))
    then = [helper.make_node("MatMul", ["raw", "twice"], ["then_logits"], name="inside")]
    model.graph.node.append(choice(then, [helper.make_node("Identity", ["raw"], ["else_logits"])], "logits"))
    sites = detect(with_condition(model, tmp_path))
    assert sites.counts() == {"R1": 3, "R2": 1, "R3": 1, "R4": 1}
    assert not sites.left_out


@pytest.mark.parametrize("export", ["genai", "optimum"])
def test_where_attention_is_not_understood_r1_and_r4_are_done(export: str, tmp_path: Path) -> None:
    source = exports.genai_like() if export == "genai" else exports.optimum_export("llama")
    model = model_io.load(source)
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.op_type = "FutureAttention"
        if export == "optimum" and node.op_type == "Softmax":
            node.replace_input_with(0, odd_scores(node))
    sites = detect(model)
    assert sites.counts() == {"R1": 5, "R2": 0, "R3": 0, "R4": 2}
    assert (sites.layers, sites.architecture) == (2, "llama")
    assert {entry.kind for entry in sites.left_out} == {Kind.R2, Kind.R3}
    assert all("is not understood" in entry.reason for entry in sites.left_out)
    plan = plan_rotation(sites, request(demand=Demand.IF_POSSIBLE))
    assert dict(plan.counts) == {"R1": 5, "R4": 2}
    assert len(plan.notes) == 2


def odd_scores(softmax: ir.Node) -> ir.Value:
    """The scores through an operator that no spelling of an attention has."""
    scores = softmax.inputs[0]
    assert scores is not None
    assert softmax.graph is not None
    odd = ir.Node("", "Erf", [scores], name=f"{softmax.name}/odd")
    odd.outputs[0].name = f"{scores.name}/odd"
    softmax.graph.insert_before(softmax, odd)
    return odd.outputs[0]
