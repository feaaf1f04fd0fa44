"""The scores of an attention: from the product Q Kᵀ to the Softmax, and from there to the product with V."""

import onnx_ir as ir

from quarot_onnx.graph.linear import is_matmul, linear_at
from quarot_onnx.graph.products import SCORE_PATH
from quarot_onnx.graph.query import (
    attribute_float,
    attribute_int,
    consumers_through,
    data_input,
    data_users,
    resolve_constant,
    through,
)
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.sites.operands import LAYOUT

_WEIGHT_PATH = frozenset({"Where", "Mul", "Slice", "Reshape"})
"""A guard against NaN, what takes a sink's weight off again, and heads as batches."""

_SCORES, _SINK = 3, 11
"""The output by which fused operators give their scores away; GroupQueryAttention's input of sinks' scores."""


def score_product(value: ir.Value) -> ir.Node | None:
    """The MatMul Q Kᵀ behind a Softmax's input, through scaling, masking and capping."""
    frontier, seen = [value], 0
    while frontier and seen < 64:
        node = through(frontier.pop(0)).producer()
        seen += 1
        if node is None:
            continue
        if is_matmul(node):
            return node if linear_at(node) is None else None
        if node.op_type in SCORE_PATH or node.op_type in LAYOUT:
            frontier.extend(v for v in node.inputs if v is not None and resolve_constant(v) is None)
    return None


def context_product(value: ir.Value) -> ir.Node | None:
    """The MatMul with V behind a Softmax's output."""
    for node, index in consumers_through(value):
        if is_matmul(node) and index == 0:
            return node
        if node.op_type in _WEIGHT_PATH and (found := context_product(node.outputs[0])):
            return found
    return None


def same_when_raised(attention: ir.Node, shapes: Shapes) -> bool:
    """Whether one number added to all scores of a query changes nothing, as a Softmax does not see it.

    It is so where nothing between the product and the Softmax but scales and masks, and nobody else reads the scores.

    Args:
        attention: The Softmax or the fused operator.
        shapes: Of its graph.
    """
    if attention.op_type != "Softmax":
        sinks = attention.inputs[_SINK : _SINK + 1] if attention.op_type == "GroupQueryAttention" else ()
        capped = attribute_float(attention, "softcap", 0.0) != 0 or attribute_int(attention, "smooth_softmax", 0) == 1
        shown = any(output.uses() or output.is_graph_output() for output in attention.outputs[_SCORES:])
        return not (capped or shown or any(value is not None for value in sinks))
    value = data_input(attention)
    product, rank = score_product(value), shapes.rank(value)
    if product is None or attribute_int(attention, "axis", -1) not in {-1, (rank or 0) - 1}:
        return False
    while True:
        value = through(value)
        node = value.producer()
        if node is None or value.is_graph_output() or len(data_users(value)) != 1:
            return False
        if node is product:
            return True
        behind = [i for i, v in enumerate(node.inputs) if v is not None and score_product(v) is product]
        if len(behind) != 1 or not _keeps(node, behind[0], shapes):
            return False
        value = data_input(node, behind[0])


def _keeps(node: ir.Node, index: int, shapes: Shapes) -> bool:
    """Whether what is added to all of operand ``index`` is added, scaled perhaps, to all that the node makes of it."""
    if node.op_type in {"Mul", "Div"}:
        factor = node.inputs[1 - index]
        return (node.op_type == "Mul" or index == 0) and factor is not None and shapes.is_one_per_row(factor)
    return node.op_type in {"Add", "Sub"} or (node.op_type == "Where" and index > 0)
