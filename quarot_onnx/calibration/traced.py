"""What an input is for, read off the nodes that it reaches: masks and lengths."""

from collections import deque
from collections.abc import Iterator

import onnx_ir as ir

from quarot_onnx.calibration.inputs import InputRole, TensorSpec, position_axis
from quarot_onnx.graph.products import SCORE_PATH
from quarot_onnx.graph.query import attribute_int

_LAYOUT = frozenset(
    {"Cast", "Identity", "Slice", "Unsqueeze", "Squeeze", "Expand", "Reshape", "Gather", "Transpose", "Tile"}
)
_COMPARED = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or"})
_MASK_INPUTS = {"GroupQueryAttention": {10}, "MultiHeadAttention": {4, 5}, "Attention": {3}}
"""Where fused operators take masks; the cache inputs of the same operators make a cache."""

_IN_PLACE = frozenset({"GroupQueryAttention", "GatherND"})
_WRITERS = frozenset({"ScatterND", "ScatterElements", "TensorScatter", "Where"})
_OF_INTEGERS = frozenset({"Mul", "Sub", "DequantizeLinear", "BitShift", "BitwiseAnd", "Split"})
"""What makes numbers of a cache of integers."""

_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Concat", "Neg", "Min", "Max"})
_ANGLES = frozenset({"Cos", "Sin", "RotaryEmbedding"})


def mask_role(value: ir.Value) -> InputRole | None:
    """Whether an input masks scores, by being added to them or by ones and zeros; None for what does not.

    The first node that tells decides. A cache is joined to what is new, or read by a product.
    """
    found: InputRole | None = None
    for node, index in _reached(value, _LAYOUT):
        if node.op_type in _MASK_INPUTS:
            return InputRole.BIAS if index in _MASK_INPUTS[node.op_type] else None
        if node.op_type in ("Concat", "MatMul") or node.op_type.startswith("Scatter"):
            return None
        if found is not None:
            continue
        if (node.op_type == "Sub" and index == 1) or node.op_type in _COMPARED or (node.op_type, index) == ("Where", 0):
            found = InputRole.MASK
        elif node.op_type in ("Add", "Sub", "Where") and _are_scores(node.outputs[0]):
            found = InputRole.BIAS
        elif node.op_type == "Cast" and attribute_int(node, "to", 0) == ir.DataType.BOOL:
            found = InputRole.MASK
    return found


def _are_scores(value: ir.Value) -> bool:
    """Whether a Softmax follows, with nothing in between but what works on single scores."""
    return any(node.op_type == "Softmax" for node, _ in _reached(value, _LAYOUT | SCORE_PATH, every_input=True))


def is_joined(value: ir.Value) -> bool | None:
    """Whether what is new is joined to a cache (True) or written into it (False); None where nothing tells.

    What is put before a cache, as a prefix is, or beside it, as keys and values are in one, is nothing new. Rows that
    are picked out of both, old and new, are in their places.
    """
    joined = None
    for node, index in _reached(value, _LAYOUT | _OF_INTEGERS | {"Concat"}, every_input=True):
        if node.op_type in _IN_PLACE or (joined is None and node.op_type in _WRITERS):
            return False
        if node.op_type == "Concat" and index == 0 and _along_positions(node, value):
            joined = True
    return joined


def _along_positions(concat: ir.Node, cache: ir.Value) -> bool:
    """Whether a Concat makes a cache, or what was made of it, longer."""
    shape, made = TensorSpec.of(cache).shape, concat.outputs[0].shape
    if shape is None or (made is not None and len(made) != len(shape)):
        return True  # in another layout
    return attribute_int(concat, "axis", 0) % len(shape) == position_axis(shape)


def length_role(value: ir.Value) -> InputRole | None:
    """What an integer counts: logits to keep, the past, the total length; None where the graph does not show it.

    ``x[:, -n:]`` keeps n logits; a Range begins at the past's length and ends at the total; tables of RoPE are cut or
    indexed at the past's length.
    """
    queue = deque([(value, False, True)])
    seen = {value}
    while queue:
        current, negated, plain = queue.popleft()
        for use in current.uses():
            node, index = use.node, use.idx
            found = _length_at(node, index, negated=negated, plain=plain)
            if found is not None:
                return found
            if node.op_type in _LAYOUT | _ARITHMETIC:
                turned = node.op_type == "Neg" or (node.op_type == "Sub" and index == 1)
                for output in node.outputs:
                    if output not in seen:
                        seen.add(output)
                        queue.append((output, negated ^ turned, plain and node.op_type not in ("Add", "Sub", "Mul")))
    return None


def _length_at(node: ir.Node, index: int, *, negated: bool, plain: bool) -> InputRole | None:
    """What a number is that ends as this input of a node; ``plain``: as it was given, nothing added."""
    if node.op_type == "GroupQueryAttention":
        return {5: InputRole.LAST_POSITION, 6: InputRole.TOTAL_LENGTH}.get(index)
    if node.op_type == "MultiHeadAttention" and index == 8:
        return InputRole.PAST_LENGTH
    if node.op_type == "Slice" and index == 1:
        return InputRole.KEPT if negated else InputRole.PAST_LENGTH
    if negated:
        return None
    if (node.op_type == "Slice" and index == 2) or (node.op_type == "Range" and index == 1):
        return InputRole.TOTAL_LENGTH if plain else None
    is_start = (node.op_type == "Range" and index == 0) or node.op_type in _ANGLES
    return InputRole.PAST_LENGTH if is_start else None


def _reached(value: ir.Value, carriers: frozenset[str], *, every_input: bool = False) -> Iterator[tuple[ir.Node, int]]:
    """Every use of a value and of what carriers make of it, the nearest first.

    Only what is carried on counts, not where to: an index or a shape says nothing of what it is used for; with
    ``every_input`` operands in other places count too.
    """
    queue, seen = deque([value]), {value}
    while queue:
        for use in queue.popleft().uses():
            yield use.node, use.idx
            if use.node.op_type in carriers and (use.idx == 0 or every_input):
                fresh = [output for output in use.node.outputs if output not in seen]
                seen.update(fresh)
                queue.extend(fresh)
