"""Follow an attention's operands: V back to its Linear, the result on to O (Q and K: ``head_axis``).

What is rotated must not be seen by anybody else: on every step of the way the value may have one user only
(its shape may be asked for, and it may be an output of the graph: the cache).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from quarot_onnx.graph.linear import Linear, linear_at, linear_producing
from quarot_onnx.graph.query import (
    attribute_int,
    attribute_ints,
    data_input,
    data_users,
    label,
    passes,
    small_ints,
    through,
)
from quarot_onnx.graph.shapes import Shapes

LAYOUT = frozenset({"Reshape", "Transpose", "Expand", "Unsqueeze", "Squeeze", "Tile"})
STEPS = 32
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
    for _ in range(STEPS):
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
    for _ in range(STEPS):
        value = through(value)
        linear = linear_producing(value)
        if linear is not None:
            return _source(linear, columns, user, what, shapes)
        refuse_other_users(value, user, what)
        node = value.producer()
        if node is None:
            raise NotTracedError(f"{what} comes from the graph input {value.name!r}, not from a Linear")
        if node.op_type in LAYOUT:
            _refuse_mixed_layout(node, what)
            value = data_input(node)
        elif node.op_type == "Concat":
            value = without_past(node, what, shapes)
        elif node.op_type in ("Split", "Slice") and columns is None:
            columns = _columns(node, value, what, shapes)
            value = data_input(node)
        else:
            raise NotTracedError(f"between {what} and its Linear stands {label(node)} ({node.op_type})")
        user = node
    raise NotTracedError(f"no Linear was found behind {what}")


def refuse_other_users(value: ir.Value, user: ir.Node, what: str) -> None:
    """Refuse an operand that is seen by somebody else than ``user``, or by it twice.

    Raises:
        NotTracedError: It is.
    """
    if passes(user):  # a pass-through node on the way is looked through on both sides
        return
    users = [node for node, _ in data_users(value)]
    others = [node for node in users if node is not user]
    if others:
        raise NotTracedError(f"{what} is used by {label(others[0])} ({others[0].op_type}) too")
    if len(users) > 1:
        raise NotTracedError(f"{label(user)} ({user.op_type}) reads {what} as another operand, too")


def _refuse_mixed_layout(node: ir.Node, what: str) -> None:
    """A Transpose that moves the last axis of a 4-D value mixes heads and entries of heads."""
    perm = attribute_ints(node, "perm") if node.op_type == "Transpose" else None
    if perm is not None and len(perm) > 2 and perm[-1] != len(perm) - 1:
        raise NotTracedError(f"{label(node)} moves the last axis of {what}")


def joins_last_axis(concat: ir.Node, shapes: Shapes) -> bool:
    """Whether a Concat joins parts of heads (rotated and not rotated by RoPE) and not positions."""
    axis, rank = attribute_int(concat, "axis", 0), shapes.rank(concat.outputs[0])
    return axis == -1 or axis == (4 if rank is None else rank) - 1


def without_past(concat: ir.Node, what: str, shapes: Shapes) -> ir.Value:
    """The operand of a past-cache Concat that is new.

    Raises:
        NotTracedError: It joins something else.
    """
    fresh = [v for v in concat.inputs if v is not None and not through(v).is_graph_input()]
    if len(fresh) != 1 or len(concat.inputs) != 2 or joins_last_axis(concat, shapes):
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
        refuse_other_users(linear.output, user, what)
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
