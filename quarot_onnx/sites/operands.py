"""Follow an attention's operands: V back to its Linear, Q and K back to the end of RoPE, the result on to O.

What is rotated must not be seen by anybody else: on every step of the way the value may have one user only
(its shape may be asked for, and it may be an output of the graph: the cache).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from quarot_onnx.graph.linear import Linear, linear_at, linear_producing
from quarot_onnx.graph.query import (
    FLOAT_TYPES,
    SIZE_ONLY,
    attribute_int,
    attribute_ints,
    data_input,
    data_users,
    label,
    passes,
    resolve_constant,
    small_ints,
    through,
)
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.graph.tags import is_online
from quarot_onnx.sites.moves import scaled_operand

LAYOUT = frozenset({"Reshape", "Transpose", "Expand", "Unsqueeze", "Squeeze", "Tile"})
_STEPS = 32
"""Exporters put about ten nodes between a Linear and an attention's product."""


class NotTracedError(Exception):
    """An operand could not be followed; carries the reason in the user's words."""


@dataclass(frozen=True, eq=False)
class Source:
    """The Linear that an operand comes from, and which of its columns.

    Attributes:
        linear: The Linear.
        start: The first column.
        width: Their number.
    """

    linear: Linear
    start: int
    width: int


def output_linear(context: ir.Value) -> Linear:
    """The O Linear behind softmax(...) V.

    Raises:
        NotTracedError: Something other than changes of layout stands between, or the result has other users.
    """
    value, flipped = context, False
    for _ in range(_STEPS):
        users = data_users(value)
        if len(users) != 1 or value.is_graph_output():
            raise NotTracedError(f"the attention's result has {len(users)} users, so its output Linear is not clear")
        node, index = users[0]
        linear = linear_at(node)
        if linear is not None and index == 0 and linear.transposed_input == flipped:
            return linear
        if node.op_type not in LAYOUT:
            raise NotTracedError(f"between attention and its output Linear stands {label(node)} ({node.op_type})")
        _refuse_mixed_layout(node, "the attention's result")
        # Before a Gemm with transA, the matrix [rows, in] is turned.
        flipped ^= node.op_type == "Transpose" and attribute_ints(node, "perm") in (None, (1, 0))
        value = node.outputs[0]
    raise NotTracedError("no Linear follows the attention")


def follow_to_linear(value: ir.Value, user: ir.Node, what: str, shapes: Shapes) -> Source:
    """Walk back from an operand to its Linear, keeping track of the columns.

    Args:
        value: The operand.
        user: The node that reads it.
        what: The operand's name in messages.
        shapes: Inferred shapes.

    Raises:
        NotTracedError: What stands between is not understood, or somebody else uses the operand.
    """
    columns: _Columns | None = None
    for _ in range(_STEPS):
        value = through(value)
        linear = linear_producing(value)
        if linear is not None:
            return _source(linear, columns, user, what, shapes)
        _refuse_other_users(value, user, what)
        node = value.producer()
        if node is None:
            raise NotTracedError(f"{what} comes from the graph input {value.name!r}, not from a Linear")
        if node.op_type in LAYOUT:
            _refuse_mixed_layout(node, what)
            value = data_input(node)
        elif node.op_type == "Concat":
            value = _without_past(node, what, shapes)
        elif node.op_type in ("Split", "Slice") and columns is None:
            columns = _columns(node, value, what, shapes)
            value = data_input(node)
        else:
            raise NotTracedError(f"between {what} and its Linear stands {label(node)} ({node.op_type})")
        user = node
    raise NotTracedError(f"no Linear was found behind {what}")


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


def after_rope(value: ir.Value, user: ir.Node, what: str, shapes: Shapes, *, axis: int = -1) -> HeadAxis:
    """Walk back over scaling, repetition, transposition and the cache; stop where the values are made or rotated.

    Args:
        value: Q or K as the attention reads it.
        user: The node that reads it.
        what: The operand's name in messages.
        shapes: Inferred shapes.
        axis: Where the entries of a head lie in ``value``: -2 for Kᵀ.

    Raises:
        NotTracedError: The way is not understood, somebody else uses the operand, or it holds the past.
    """
    length, reshaped = None, False
    for _ in range(_STEPS):
        _refuse_other_users(value, user, what)
        shape = shapes.of(value)
        if shape is not None and len(shape) >= -axis:
            length = shape[axis] or length
        node = value.producer()
        source = None if node is None or is_online(node) else _before(node, what, axis, shapes)
        if node is None or source is None:
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
    if node.op_type == "Concat" and not _joins_last_axis(node, shapes):
        return _without_past(node, what, shapes)
    return None


def _refuse_changed_axis(node: ir.Node, what: str, axis: int, shapes: Shapes) -> None:
    """A change of layout is followed along an inner axis only where that axis visibly stays as it is."""
    before, after = shapes.of(data_input(node)), shapes.of(node.outputs[0])
    same = before is not None and after is not None and min(len(before), len(after)) >= -axis
    if not (same and before and after and before[axis] is not None and before[axis] == after[axis]):
        raise NotTracedError(f"{label(node)} changes the layout of {what} in a way that is not to be followed")


def _refuse_other_users(value: ir.Value, user: ir.Node, what: str) -> None:
    if passes(user):  # a pass-through node on the way is looked through on both sides
        return
    users = [node for node, _ in data_users(value)]
    others = [node for node in users if node is not user]
    if others:
        raise NotTracedError(f"{what} is used by {label(others[0])} ({others[0].op_type}) too")
    if len(users) > 1:
        raise NotTracedError(f"{label(user)} ({user.op_type}) reads {what} as another operand, too")


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


def _refuse_mixed_layout(node: ir.Node, what: str) -> None:
    """A Transpose that moves the last axis of a 4-D value mixes heads and entries of heads."""
    perm = attribute_ints(node, "perm") if node.op_type == "Transpose" else None
    if perm is not None and len(perm) > 2 and perm[-1] != len(perm) - 1:
        raise NotTracedError(f"{label(node)} moves the last axis of {what}")


def _joins_last_axis(concat: ir.Node, shapes: Shapes) -> bool:
    """Whether a Concat joins parts of heads (rotated and not rotated by RoPE) and not positions."""
    axis, rank = attribute_int(concat, "axis", 0), shapes.rank(concat.outputs[0])
    return axis == -1 or axis == (4 if rank is None else rank) - 1


def _without_past(concat: ir.Node, what: str, shapes: Shapes) -> ir.Value:
    """The operand of a past-cache Concat that is new."""
    fresh = [v for v in concat.inputs if v is not None and not through(v).is_graph_input()]
    if len(fresh) != 1 or len(concat.inputs) != 2 or _joins_last_axis(concat, shapes):
        raise NotTracedError(f"{label(concat)} joins {what} in a way that is no past-cache Concat")
    return fresh[0]


@dataclass(frozen=True, eq=False)
class _Columns:
    """A range of the columns of a merged projection."""

    start: int
    width: int
    whole: int


def _source(linear: Linear, columns: _Columns | None, user: ir.Node, what: str, shapes: Shapes) -> Source:
    """A Linear whose columns are used by this operand alone."""
    if linear.bias_is_spread:
        raise NotTracedError(f"{linear.name} adds one number to all of its outputs, which cannot be rotated")
    if columns is None:
        _refuse_other_users(linear.output, user, what)
        return Source(linear, 0, linear.out_features)
    if columns.whole != linear.out_features:
        raise NotTracedError(f"{label(user)} takes {what} out of every head of {linear.name}, not a range of columns")
    for other in _other_ranges(linear, user, what, shapes):
        if other.start < columns.start + columns.width and columns.start < other.start + other.width:
            raise NotTracedError(f"columns of {linear.name} are used both by {what} and elsewhere")
    return Source(linear, columns.start, columns.width)


def _other_ranges(linear: Linear, user: ir.Node, what: str, shapes: Shapes) -> Iterator[_Columns]:
    """Which columns of a merged projection its other users take."""
    for node, _ in data_users(linear.output):
        if node is user:
            continue
        if node.op_type not in ("Split", "Slice"):
            raise NotTracedError(f"{what} is used by {label(node)} ({node.op_type}) too")
        for out in node.outputs:
            yield _columns(node, out, what, shapes)


def _columns(node: ir.Node, value: ir.Value, what: str, shapes: Shapes) -> _Columns:
    """Which columns of a merged projection a Split or Slice takes."""
    whole, rank = shapes.last(data_input(node)), shapes.rank(data_input(node))
    last = (-1, (rank or 0) - 1)
    if node.op_type == "Slice":
        starts, ends, axes, steps = (small_ints(v) for v in (*node.inputs[1:], None, None)[:4])
        if starts and ends and axes and len(axes) == 1 and axes[0] in last and steps in (None, (1,)) and whole:
            start, stop, _ = slice(starts[0], ends[0]).indices(whole)
            return _Columns(start, stop - start, whole)
        raise NotTracedError(f"{label(node)} takes a part of {what} that is no plain range of columns")
    axis = attribute_int(node, "axis", 0)
    sizes = small_ints(node.inputs[1]) if len(node.inputs) > 1 else attribute_ints(node, "split")
    if sizes is None and whole is not None and whole % len(node.outputs) == 0:
        sizes = (whole // len(node.outputs),) * len(node.outputs)
    index = value.index()
    if sizes is None or axis not in last or index is None:
        raise NotTracedError(f"{label(node)} splits {what} along axis {axis}, not along columns")
    return _Columns(sum(sizes[:index]), sizes[index], sum(sizes))


def overlaps(node: ir.Node, value: ir.Value, columns: range, shapes: Shapes) -> bool:
    """Whether ``value``, what a Split or Slice takes, may hold some of these columns of a merged projection."""
    try:
        taken = _columns(node, value, "V", shapes)
    except NotTracedError:
        return True
    return taken.start < columns.stop and columns.start < taken.start + taken.width
