"""Find attentions, in every spelling, and what R2 and R3 need of them.

Spelt out::

    scores = Q Kᵀ (scaled, masked, capped) ── Softmax ── (NaN guard) ── MatMul V ── Transpose ── Reshape ── O

Fused: GroupQueryAttention, MultiHeadAttention (com.microsoft), Attention (opset 23).

V is followed from the product back to the Linear that makes it, through reshapes, head repetition, the
past-value Concat and the Split or Slice of a merged projection. Q and K are followed back from the score
product to the last point before the scaling, the head repetition and the past-key Concat: that is where
RoPE has ended and R3 goes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import onnx_ir as ir

from quarot_onnx.graph.linear import Linear, linear_at, linear_producing
from quarot_onnx.graph.query import (
    PASS_THROUGH,
    attribute_int,
    attribute_ints,
    consumers_through,
    data_input,
    label,
    resolve_constant,
    scalar,
    small_ints,
    through,
)
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.sites.model import Attention, HeadRotation, Kind, LeftOut

_T = TypeVar("_T")

LAYOUT = frozenset({"Reshape", "Transpose", "Expand", "Unsqueeze", "Squeeze", "Tile"})
SCORE_PATH = frozenset({"Add", "Sub", "Mul", "Div", "Where", "Tanh", "Max", "Min", "Clip"})
SIZE_ONLY = frozenset({"Shape", "Size"})
FUSED_INPUTS = {
    ("com.microsoft", "GroupQueryAttention"): (0, 1, 2),
    ("com.microsoft", "MultiHeadAttention"): (0, 1, 2),
    ("", "Attention"): (0, 1, 2),
}
"""Where the fused operators take Q, K and V."""


class _NotTracedError(Exception):
    """An operand could not be followed; carries the reason in the user's words."""


@dataclass(frozen=True, eq=False)
class _Source:
    """The Linear that an operand comes from, and which of its columns."""

    linear: Linear
    start: int
    width: int


def find_attentions(graph: ir.Graph, shapes: Shapes) -> tuple[list[Attention], list[LeftOut]]:
    """All attentions of a decoder's graph.

    Args:
        graph: The graph.
        shapes: Inferred shapes.

    Returns:
        The attentions in graph order, and why R2 or R3 cannot go to some of them.
    """
    found: list[Attention] = []
    left_out: list[LeftOut] = []
    for node in graph:
        parts: _Parts | None = None
        if (node.domain, node.op_type) in FUSED_INPUTS:
            parts = _fused(node, shapes)
        elif node.op_type == "Softmax":
            parts = _spelt(node, shapes)
        if parts is not None:
            found.append(_assemble(parts, shapes, left_out))
    return found, left_out


@dataclass(frozen=True, eq=False)
class _Parts:
    """The operands of one attention, before they are followed."""

    node: ir.Node
    query: ir.Value
    key: ir.Value | None
    value: ir.Value | None
    context: ir.Value
    head_dim: int | None
    num_heads: int | None
    num_kv_heads: int | None
    rope_inside: bool = False


def _fused(node: ir.Node, shapes: Shapes) -> _Parts | None:
    """The operands of a fused operator."""
    query, key, value = (node.inputs[i] if i < len(node.inputs) else None for i in (0, 1, 2))
    if query is None:
        return None
    if node.op_type == "Attention":
        heads, kv_heads = attribute_int(node, "q_num_heads", 0), attribute_int(node, "kv_num_heads", 0)
        q_shape, v_shape = shapes.of(query), None if value is None else shapes.of(value)
        if not heads and q_shape is not None and len(q_shape) == 4:
            heads = q_shape[1] or 0
            kv_heads = (v_shape[1] or 0) if v_shape is not None and len(v_shape) == 4 else 0
    else:
        heads = attribute_int(node, "num_heads", 0)
        kv_heads = attribute_int(node, "kv_num_heads", 0)
    rope = node.op_type == "GroupQueryAttention" and bool(attribute_int(node, "do_rotary", 0))
    return _Parts(node, query, key, value, node.outputs[0], None, heads or None, kv_heads or None, rope)


def _spelt(softmax: ir.Node, shapes: Shapes) -> _Parts | None:
    """The operands of a spelt-out attention, or None when the Softmax belongs to something else."""
    scores = _score_product(data_input(softmax))
    product = _context_product(softmax.outputs[0])
    if scores is None or product is None:
        return None
    value = data_input(product, 1)
    head_dim = shapes.last(product.outputs[0]) or shapes.last(value)
    return _Parts(
        softmax, data_input(scores, 0), data_input(scores, 1), value, product.outputs[0], head_dim, None, None
    )


def _score_product(value: ir.Value) -> ir.Node | None:
    """The MatMul Q Kᵀ behind a Softmax's input, through scaling, masking and capping."""
    frontier, seen = [value], 0
    while frontier and seen < 64:
        node = through(frontier.pop(0)).producer()
        seen += 1
        if node is None:
            continue
        if node.op_type == "MatMul":
            return node if linear_at(node) is None else None
        if node.op_type in SCORE_PATH or node.op_type in LAYOUT:
            frontier.extend(v for v in node.inputs if v is not None and resolve_constant(v) is None)
    return None


def _context_product(value: ir.Value) -> ir.Node | None:
    """The MatMul with V behind a Softmax's output, through a NaN guard."""
    for node, index in consumers_through(value):
        if node.op_type == "MatMul" and index == 0:
            return node
        if node.op_type in ("Where", "Mul") and (found := _context_product(node.outputs[0])):
            return found
    return None


def _assemble(parts: _Parts, shapes: Shapes, left_out: list[LeftOut]) -> Attention:
    """Follow the operands and write down what could not be followed."""

    def attempt(kind: Kind, follow: Callable[[], _T]) -> _T | None:
        try:
            return follow()
        except _NotTracedError as error:
            left_out.append(LeftOut(label(parts.node), str(error), kind))
            return None

    output = attempt(Kind.R2, lambda: _output_linear(parts.context))
    head_dim = parts.head_dim
    if head_dim is None and output is not None and parts.num_heads:
        head_dim = output.in_features // parts.num_heads
    if head_dim is None:
        left_out.append(LeftOut(label(parts.node), "the length of a head is not to be seen in the graph", Kind.R2))
        left_out.append(LeftOut(label(parts.node), "the length of a head is not to be seen in the graph", Kind.R3))
        return Attention(parts.node, parts.num_heads or 0, parts.num_kv_heads or 0, 0, None, 0, output, None)
    num_heads = parts.num_heads or (output.in_features // head_dim if output else 0)
    source = attempt(Kind.R2, lambda: _value_source(parts, num_heads, head_dim, shapes))
    num_kv_heads = parts.num_kv_heads or (source.width // head_dim if source else num_heads)
    heads = attempt(Kind.R3, lambda: _head_rotation(parts, head_dim, shapes))
    usable = source is not None and output is not None and _fits(source, output, head_dim, parts, left_out)
    return Attention(
        parts.node,
        num_heads,
        num_kv_heads,
        head_dim,
        source.linear if usable and source else None,
        source.start if source else 0,
        output,
        heads,
    )


def _fits(source: _Source, output: Linear, head_dim: int, parts: _Parts, left_out: list[LeftOut]) -> bool:
    """Whether V's columns and O's rows are whole heads."""
    if source.width % head_dim == 0 and output.in_features % head_dim == 0:
        return True
    reason = f"V has {source.width} columns and O {output.in_features} rows: not whole heads of {head_dim}"
    left_out.append(LeftOut(label(parts.node), reason, Kind.R2))
    return False


def _output_linear(context: ir.Value) -> Linear:
    """The O Linear behind softmax(...) V."""
    value = context
    for _ in range(8):
        users = [(n, i) for n, i in consumers_through(value) if n.op_type not in SIZE_ONLY]
        if len(users) != 1:
            raise _NotTracedError(f"the attention's result has {len(users)} users, so its output Linear is not clear")
        node, index = users[0]
        linear = linear_at(node)
        if linear is not None and index == 0 and not linear.transposed_input:
            return linear
        if node.op_type not in LAYOUT:
            raise _NotTracedError(f"between attention and its output Linear stands {label(node)} ({node.op_type})")
        value = node.outputs[0]
    raise _NotTracedError("no Linear follows the attention")


def _value_source(parts: _Parts, num_heads: int, head_dim: int, shapes: Shapes) -> _Source:
    """The Linear and the columns that V comes from."""
    if parts.value is not None:
        return _follow_to_linear(parts.value, "V", shapes)
    packed = _follow_to_linear(parts.query, "the packed QKV", shapes)
    kv_heads = parts.num_kv_heads or num_heads
    width = kv_heads * head_dim
    if packed.width != (num_heads + 2 * kv_heads) * head_dim:
        raise _NotTracedError(f"the packed QKV has {packed.width} columns, not those of {num_heads}+2·{kv_heads} heads")
    return _Source(packed.linear, packed.start + (num_heads + kv_heads) * head_dim, width)


def _follow_to_linear(value: ir.Value, what: str, shapes: Shapes) -> _Source:
    """Walk back from an operand to its Linear, keeping track of the columns."""
    start, width = 0, None
    for _ in range(32):
        value = through(value)
        linear = linear_producing(value)
        if linear is not None:
            return _Source(linear, start, linear.out_features if width is None else width)
        node = value.producer()
        if node is None:
            raise _NotTracedError(f"{what} comes from the graph input {value.name!r}, not from a Linear")
        if node.op_type in LAYOUT:
            _refuse_mixed_layout(node, what)
            value = data_input(node)
        elif node.op_type == "Concat":
            value = _without_past(node, what, shapes)
        elif node.op_type in ("Split", "Slice") and width is None:
            start, width = _columns(node, value, what, shapes)
            value = data_input(node)
        else:
            raise _NotTracedError(f"between {what} and its Linear stands {label(node)} ({node.op_type})")
    raise _NotTracedError(f"no Linear was found behind {what}")


def _refuse_mixed_layout(node: ir.Node, what: str) -> None:
    """A Transpose that moves the last axis of a 4-D value mixes heads and entries of heads."""
    perm = attribute_ints(node, "perm") if node.op_type == "Transpose" else None
    if perm is not None and len(perm) > 2 and perm[-1] != len(perm) - 1:
        raise _NotTracedError(f"{label(node)} moves the last axis of {what}")


def _without_past(concat: ir.Node, what: str, shapes: Shapes) -> ir.Value:
    """The operand of a past-cache Concat that is new."""
    rank = shapes.rank(concat.outputs[0])
    axis = attribute_int(concat, "axis", 0)
    fresh = [v for v in concat.inputs if v is not None and not through(v).is_graph_input()]
    if len(fresh) != 1 or axis == -1 or (rank is not None and axis == rank - 1):
        raise _NotTracedError(f"{label(concat)} joins {what} in a way that is no past-cache Concat")
    return fresh[0]


def _columns(node: ir.Node, value: ir.Value, what: str, shapes: Shapes) -> tuple[int, int]:
    """Which columns of a merged projection a Split or Slice takes: (start, width)."""
    whole = shapes.last(data_input(node))
    rank = shapes.rank(data_input(node))
    if node.op_type == "Slice":
        starts, ends, axes, steps = (small_ints(v) for v in (*node.inputs[1:], None, None)[:4])
        ok = starts and ends and axes and len(axes) == 1 and steps in (None, (1,))
        if ok and starts and ends and axes and axes[0] in (-1, (rank or 0) - 1) and whole is not None:
            start, stop, _ = slice(starts[0], ends[0]).indices(whole)
            return start, stop - start
        raise _NotTracedError(f"{label(node)} takes a part of {what} that is no plain range of columns")
    axis = attribute_int(node, "axis", 0)
    sizes = small_ints(node.inputs[1]) if len(node.inputs) > 1 else attribute_ints(node, "split")
    if sizes is None and whole is not None and whole % len(node.outputs) == 0:
        sizes = (whole // len(node.outputs),) * len(node.outputs)
    if sizes is None or axis not in (-1, (rank or 0) - 1):
        raise _NotTracedError(f"{label(node)} splits {what} along axis {axis}, not along columns")
    index = value.index()
    assert index is not None
    return sum(sizes[:index]), sizes[index]


def _head_rotation(parts: _Parts, head_dim: int, shapes: Shapes) -> HeadRotation:
    """Where R3 goes."""
    packed = parts.key is None
    if parts.rope_inside or packed:
        if parts.node.op_type != "GroupQueryAttention":
            raise _NotTracedError(f"{parts.node.op_type} takes Q and K packed: there is no place for R3")
        return HeadRotation(None, None, parts.node)
    assert parts.key is not None
    query, key = _after_rope(parts.query, "Q", shapes), _after_rope(parts.key, "K", shapes)
    for value, what in ((query, "Q"), (key, "K")):
        last = shapes.last(value)
        if last is None and (parts.node.domain, parts.node.op_type) not in FUSED_INPUTS:
            raise _NotTracedError(f"the last axis of {what} after RoPE has no known length")
        if last is not None and last % head_dim:
            raise _NotTracedError(f"the last axis of {what} after RoPE has length {last}, not whole heads of {head_dim}")
    return HeadRotation(query, key)


def _after_rope(value: ir.Value, what: str, shapes: Shapes) -> ir.Value:
    """Walk back over scaling, repetition, transposition and the cache; stop where the values are made."""
    for _ in range(32):
        node = value.producer()
        if node is None:
            return value
        if node.op_type in PASS_THROUGH or node.op_type in LAYOUT:
            value = data_input(node)
        elif node.op_type in ("Mul", "Div") and (factor := _scaled_operand(node, shapes)) is not None:
            value = factor
        elif node.op_type == "Concat":
            try:
                value = _without_past(node, what, shapes)
            except _NotTracedError:
                return value
        else:
            return value
    raise _NotTracedError(f"no end of RoPE was found behind {what}")


def _scaled_operand(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """The operand of a Mul or Div whose other operand is one number, constant or computed."""
    for index in (0, 1):
        other = data_input(node, 1 - index)
        if scalar(other) is not None or shapes.is_single(other):
            return data_input(node, index)
    return None
