"""Follow Q and K back to the end of RoPE, where R3 goes; as in ``operands``, nobody else may see them on the way."""

from dataclasses import dataclass

import onnx_ir as ir

from quarot_onnx.graph.linear import linear_producing
from quarot_onnx.graph.query import (
    FLOAT_TYPES,
    SIZE_ONLY,
    attribute_ints,
    data_input,
    label,
    passes,
    resolve_constant,
)
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.graph.tags import is_online
from quarot_onnx.sites.moves import scaled_operand
from quarot_onnx.sites.operands import (
    LAYOUT,
    STEPS,
    NotTracedError,
    joins_last_axis,
    refuse_other_users,
    without_past,
)


@dataclass(frozen=True, eq=False)
class HeadAxis:
    """Q or K where RoPE has ended.

    Attributes:
        value: [..., head_dim] or packed [batch, seq, heads · head_dim].
        length: Length of its last axis, or None where the graph does not say.
        reshaped: A Reshape stands between it and the attention, so that its last axis may be another one.
    """

    value: ir.Value
    length: int | None
    reshaped: bool


def after_rope(value: ir.Value, user: ir.Node, what: str, shapes: Shapes, *, head_dim: int, axis: int = -1) -> HeadAxis:
    """Walk back over scaling, repetition, transposition and the cache; stop where the values are made or rotated.

    Args:
        value: Q or K as the attention reads it.
        user: The node that reads it.
        what: The operand's name in messages.
        shapes: Inferred shapes.
        head_dim: Length of a head, for a Reshape that puts one together: interleaved RoPE ends with pairs.
        axis: Where the entries of a head lie in ``value``: -2 for Kᵀ.

    Raises:
        NotTracedError: The way is not understood, somebody else uses the operand, or it holds the past.
    """
    length, reshaped = None, False
    for _ in range(STEPS):
        refuse_other_users(value, user, what)
        shape = shapes.of(value)
        if shape is not None and len(shape) >= -axis:
            length = shape[axis] or length
        node = value.producer()
        source = None if node is None or is_online(node) else _before(node, what, axis, shapes)
        if node is None or source is None or (axis == -1 and _joins_pairs(node, head_dim, shapes)):
            if axis != -1:
                raise NotTracedError(f"the last axis of {what} after RoPE does not hold the entries of a head")
            _refuse_past(value, what)
            return HeadAxis(value, length, reshaped)
        if node.op_type == "Transpose":
            perm = attribute_ints(node, "perm")
            axis = perm[axis] - len(perm) if perm is not None else -1 - (len(shape or ()) + axis)
        elif node.op_type == "Reshape":
            length, reshaped = None, True
        value, user = source, node
    raise NotTracedError(f"no end of RoPE was found behind {what}")


def _before(node: ir.Node, what: str, axis: int, shapes: Shapes) -> ir.Value | None:
    """What a node on the way of Q or K reads; None when the way ends at the node."""
    if passes(node):
        return data_input(node)
    if node.op_type in LAYOUT:
        if axis != -1 and node.op_type != "Transpose":
            _refuse_changed_axis(node, what, axis, shapes)
        return data_input(node)
    if node.op_type in ("Mul", "Div"):
        vector = scaled_operand(node, shapes)
        other = None if vector is None else next((v for v in node.inputs if v is not vector), None)
        return vector if other is not None and (shapes.is_single(other) or resolve_constant(other)) else None
    if node.op_type == "Concat" and not joins_last_axis(node, shapes):
        return without_past(node, what, shapes)
    return None


def _joins_pairs(node: ir.Node, head_dim: int, shapes: Shapes) -> bool:
    """Whether a Reshape puts heads together out of shorter rows, [..., head_dim / 2, 2], as interleaved RoPE ends."""
    rows = shapes.last(data_input(node)) if node.op_type == "Reshape" else None
    return rows is not None and rows < head_dim and head_dim % rows == 0


def _refuse_changed_axis(node: ir.Node, what: str, axis: int, shapes: Shapes) -> None:
    """A change of layout is followed along an inner axis only where that axis visibly stays as it is."""
    before, after = shapes.of(data_input(node)), shapes.of(node.outputs[0])
    same = before is not None and after is not None and min(len(before), len(after)) >= -axis
    if not (same and before and after and before[axis] is not None and before[axis] == after[axis]):
        raise NotTracedError(f"{label(node)} changes the layout of {what} in a way that is not to be followed")


def _refuse_past(value: ir.Value, what: str) -> None:
    """Q and K must be rotated before the past joins them: the past was rotated in its own time."""
    seen: set[ir.Value] = set()
    frontier = [value]
    while frontier:
        current = frontier.pop()
        if current in seen or linear_producing(current) is not None:
            continue
        seen.add(current)
        node = current.producer()
        if node is not None and node.op_type not in SIZE_ONLY:
            frontier.extend(v for v in node.inputs if v is not None)
        elif (
            node is None and current.is_graph_input() and current.dtype in FLOAT_TYPES and len(current.shape or ()) > 2
        ):
            raise NotTracedError(f"the past {current.name!r} joins {what} in a way that is not understood")
