"""Following Q, K and V: what is not understood is refused, as a wrong cache would only show in decoding."""

from collections.abc import Callable

import exports
import numpy as np
import onnx_ir as ir
import pytest

from quarot_onnx.graph.edit import Editor
from quarot_onnx.graph.query import small_ints
from quarot_onnx.io import model_io
from quarot_onnx.sites.detect import detect
from quarot_onnx.sites.model import Kind, Sites


def concat_of(model: ir.Model, past: str) -> ir.Node:
    """The Concat that joins the past."""
    value = next(v for v in model.graph.inputs if v.name == past)
    return next(use.node for use in value.uses() if use.node.op_type == "Concat")


def edited(past: str, change: Callable[[Editor, ir.Node], None]) -> Sites:
    model = model_io.load(exports.optimum_export("llama"))
    change(Editor(model), concat_of(model, past))
    return detect(model)


def scale_past(edit: Editor, concat: ir.Node) -> None:
    factor = edit.initializer("factor", ir.tensor(np.array(0.5, np.float32)))
    product = edit.node("Mul", [concat.inputs[0], factor], "decayed")
    edit.before(concat, [product])
    concat.replace_input_with(0, product.outputs[0])


def replace_concat(edit: Editor, concat: ir.Node) -> None:
    edit.replace_node(concat, [edit.node("Max", list(concat.inputs), "merged")])


def read_elsewhere(edit: Editor, concat: ir.Node) -> None:
    assert concat.inputs[1] is not None
    edit.after_value(concat.inputs[1], [edit.node("Exp", [concat.inputs[1]], "spy")])


@pytest.mark.parametrize(
    ("change", "part", "kind", "reason"),
    [
        (scale_past, "key", Kind.R3, "joins K in a way that is no past-cache Concat"),
        (scale_past, "value", Kind.R2, "joins V in a way that is no past-cache Concat"),
        (replace_concat, "key", Kind.R3, "the past 'past_key_values.0.key' joins K in a way that is not understood"),
        (replace_concat, "value", Kind.R2, "between V and its Linear stands merged (Max)"),
        (read_elsewhere, "key", Kind.R3, "K is used by spy (Exp) too"),
        (read_elsewhere, "value", Kind.R2, "V is used by spy (Exp) too"),
    ],
    ids=lambda item: getattr(item, "__name__", str(item)),
)
def test_an_unusual_cache_is_left_alone_in_its_layer(
    change: Callable[[Editor, ir.Node], None], part: str, kind: Kind, reason: str
) -> None:
    sites = edited(f"past_key_values.0.{part}", change)
    assert [entry.kind for entry in sites.left_out] == [kind]
    assert sites.left_out[0].node == "/model/layers.0/self_attn/Softmax"
    assert reason in sites.left_out[0].reason
    assert sites.counts() == {"R1": 5, "R2": 2, "R3": 2, "R4": 2} | {kind: 1}


def test_an_attention_result_that_is_an_output_is_left_alone() -> None:
    model = model_io.load(exports.optimum_export("llama"))
    output = detect(model).attentions[1].output
    assert output is not None
    model.graph.outputs.append(output.input)
    sites = detect(model)
    assert [(entry.kind, entry.node) for entry in sites.left_out] == [(Kind.R2, "/model/layers.1/self_attn/Softmax")]
    assert "so its output Linear is not clear" in sites.left_out[0].reason


def test_overlapping_columns_of_a_merged_projection_are_refused() -> None:
    """A Slice of Q that reaches into V's columns."""
    model = model_io.load(exports.optimum_export("phi3"))
    attention = detect(model).attentions[0]
    assert attention.value is not None
    slices = [use.node for use in attention.value.output.uses() if use.node.op_type == "Slice"]
    assert len(slices) == 3
    edit = Editor(model)
    first = min(slices, key=lambda node: small_ints(node.inputs[1]) or ())
    first.replace_input_with(2, edit.initializer("far", ir.tensor(np.array([97]))))
    sites = detect(model)
    assert Kind.R2 in {entry.kind for entry in sites.left_out}
    assert any("used both by V and elsewhere" in entry.reason for entry in sites.left_out)
