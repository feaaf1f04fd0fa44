"""Find attentions, in every spelling, and what R2 and R3 need of them.

Spelt out::

    scores = Q Kᵀ (scaled, masked, capped) ── Softmax ── (NaN guard) ── MatMul V ── Transpose ── Reshape ── O

with MatMul or, after onnxruntime's optimiser, FusedMatMul, which scales and transposes inside.

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

from quarot_onnx.graph.caches import pasts_behind
from quarot_onnx.graph.linear import Linear
from quarot_onnx.graph.products import operand_axis
from quarot_onnx.graph.query import attribute_int, data_input, label, resolve_constant
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.sites.head_axis import after_rope
from quarot_onnx.sites.model import Attention, HeadRotation, Kind, LeftOut
from quarot_onnx.sites.operands import NotTracedError, Source, follow_to_linear, output_linear
from quarot_onnx.sites.scores import context_product, score_product

_T = TypeVar("_T")

COS, SIN, K_SCALE, Q_NORM = 7, 8, 12, 14
"""Inputs of GroupQueryAttention: RoPE's tables; before V's scale, K's; before K's norm, Q's."""

FUSED = frozenset(
    {("com.microsoft", "GroupQueryAttention"), ("com.microsoft", "MultiHeadAttention"), ("", "Attention")}
)
"""The fused operators; all take Q, K and V in front."""


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
        if (node.domain, node.op_type) in FUSED:
            parts = _fused(node, shapes)
        elif node.op_type == "Softmax":
            parts = _spelt(node, shapes)
        if parts is not None:
            found.append(_assemble(parts, shapes, left_out))
    return found, left_out


@dataclass(frozen=True, eq=False)
class _Parts:
    """The operands of one attention, before they are followed.

    Attributes:
        node: The Softmax or the fused operator.
        scores: The node that reads Q and K.
        product: The node that reads V.
        query: Q, or Q, K and V packed.
        key: K (for a spelt-out attention transposed), or None.
        value: V, or None.
        context: The attention's result.
        head_dim: Length of a head of V, where it is known.
        num_heads: Query heads, where they are known.
        num_kv_heads: Key and value heads, where they are known.
        rope_inside: The fused operator applies RoPE.
        obstacle: Why neither R2 nor R3 can go here, or None.
    """

    node: ir.Node
    scores: ir.Node
    product: ir.Node
    query: ir.Value
    key: ir.Value | None
    value: ir.Value | None
    context: ir.Value
    head_dim: int | None
    num_heads: int | None
    num_kv_heads: int | None
    rope_inside: bool = False
    obstacle: str | None = None


def _fused(node: ir.Node, shapes: Shapes) -> _Parts | None:
    """The operands of a fused operator."""
    query, key, value = (node.inputs[i] if i < len(node.inputs) else None for i in (0, 1, 2))
    if query is None:
        return None
    prefix = "q_" if node.op_type == "Attention" else ""
    heads, kv_heads = attribute_int(node, f"{prefix}num_heads", 0), attribute_int(node, "kv_num_heads", 0)
    shape = None if value is None else shapes.of(value)
    if not heads and shape is not None and len(shape) == 4:
        heads, kv_heads = (shapes.of(query) or shape)[1] or 0, shape[1] or 0
    grouped = node.op_type == "GroupQueryAttention"
    if grouped and value is None:  # Q, K and V in one
        head_dim = _head_dim(shapes.of(query), heads + 2 * kv_heads)
    else:
        head_dim = _head_dim(shape, kv_heads or heads)
    return _Parts(
        node,
        scores=node,
        product=node,
        query=query,
        key=key,
        value=value,
        context=node.outputs[0],
        head_dim=head_dim,
        num_heads=heads or None,
        num_kv_heads=kv_heads or None,
        rope_inside=grouped and bool(attribute_int(node, "do_rotary", 0)),
        obstacle=_obstacle(node, key, value),
    )


def _head_dim(shape: tuple[int | None, ...] | None, heads: int) -> int | None:
    """The length of a head of V: [batch, heads, seq, head_dim] or packed [batch, seq, heads · head_dim]."""
    last = shape[-1] if shape else None
    if shape is None or last is None or len(shape) == 4:
        return last
    return last // heads if heads and last % heads == 0 else None


def _obstacle(node: ir.Node, key: ir.Value | None, value: ir.Value | None) -> str | None:
    """What about a fused operator's operands keeps R2 and R3 out."""
    if node.op_type == "MultiHeadAttention" and (key is None or value is None):
        return "MultiHeadAttention takes Q, K and V packed head by head"
    if node.op_type == "MultiHeadAttention" and len(node.inputs) > 3 and node.inputs[3] is not None:
        return "MultiHeadAttention adds biases to Q, K and V inside"
    return None


def _head_obstacle(node: ir.Node) -> str | None:
    """What a GroupQueryAttention does to Q and K inside that a rotation before it would change."""
    if node.op_type != "GroupQueryAttention":
        return None
    for first, what in ((K_SCALE, "quantizes its cache"), (Q_NORM, "norms the heads of Q and K inside")):
        if any(v is not None for v in node.inputs[first : first + 2]):
            return f"GroupQueryAttention {what}"
    return None


def _spelt(softmax: ir.Node, shapes: Shapes) -> _Parts | None:
    """The operands of a spelt-out attention, or None when the Softmax belongs to something else."""
    scores = score_product(data_input(softmax))
    product = context_product(softmax.outputs[0])
    if scores is None or product is None:
        return None
    value = data_input(product, 1)
    turned = operand_axis(product, 1, -1, shapes) != -1
    head_dim = shapes.last(product.outputs[0]) or (None if turned else shapes.last(value))
    operands = (data_input(scores, 0), data_input(scores, 1), value, product.outputs[0])
    return _Parts(softmax, scores, product, *operands, head_dim=head_dim, num_heads=None, num_kv_heads=None)


def _assemble(parts: _Parts, shapes: Shapes, left_out: list[LeftOut]) -> Attention:
    """Follow the operands and write down what could not be followed."""

    def attempt(kind: Kind, follow: Callable[[], _T]) -> _T | None:
        try:
            return follow()
        except NotTracedError as error:
            left_out.append(LeftOut(label(parts.node), str(error), kind))
            return None

    output = attempt(Kind.R2, lambda: output_linear(parts.context))
    head_dim = parts.head_dim
    if head_dim is None and output is not None and parts.num_heads:
        head_dim = output.in_features // parts.num_heads
    if head_dim is None:
        left_out.append(LeftOut(label(parts.node), "the length of a head is not to be seen in the graph", Kind.R2))
        left_out.append(LeftOut(label(parts.node), "the length of a head is not to be seen in the graph", Kind.R3))
        return Attention(parts.node, parts.num_heads or 0, parts.num_kv_heads or 0, 0, None, 0, output, None)
    num_heads = parts.num_heads or (output.in_features // head_dim if output else 0)
    source = attempt(Kind.R2, lambda: _value_source(parts, num_heads, head_dim, shapes))
    # Where exporters repeat K and V before a fused operator, only V's Linear tells the true number of heads.
    num_kv_heads = source.width // head_dim if source else (parts.num_kv_heads or _cached_heads(parts) or num_heads)
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


def _cached_heads(parts: _Parts) -> int | None:
    """The heads of the cache that V holds, where its shape tells them."""
    shapes = (past.shape for past in pasts_behind(parts.value))
    lengths = [length for shape in shapes if shape is not None and len(shape) == 4 for length in shape[1:3]]
    return next((length for length in lengths if isinstance(length, int)), None)


def _fits(source: Source, output: Linear, head_dim: int, parts: _Parts, left_out: list[LeftOut]) -> bool:
    """Whether V's columns and O's rows are whole heads."""
    whole = source.width % head_dim == 0 and output.in_features % head_dim == 0
    if whole and output.in_features % source.width == 0:
        return True
    reason = f"V has {source.width} columns and O {output.in_features} rows: these are not heads of {head_dim}"
    left_out.append(LeftOut(label(parts.node), reason, Kind.R2))
    return False


def _value_source(parts: _Parts, num_heads: int, head_dim: int, shapes: Shapes) -> Source:
    """The Linear and the columns that V comes from."""
    if parts.obstacle is not None:
        raise NotTracedError(parts.obstacle)
    if parts.value is not None:
        if operand_axis(parts.product, 1, -1, shapes) != -1:
            raise NotTracedError(f"{label(parts.product)} reads V turned round, its heads not along the last axis")
        return follow_to_linear(parts.value, parts.product, "V", shapes)
    packed = follow_to_linear(parts.query, parts.product, "the packed QKV", shapes)
    kv_heads = parts.num_kv_heads or num_heads
    width = kv_heads * head_dim
    if packed.width != (num_heads + 2 * kv_heads) * head_dim:
        raise NotTracedError(f"the packed QKV has {packed.width} columns, not those of {num_heads}+2·{kv_heads} heads")
    return Source(packed.linear, packed.start + (num_heads + kv_heads) * head_dim, width)


def _head_rotation(parts: _Parts, head_dim: int, shapes: Shapes) -> HeadRotation:
    """Where R3 goes."""
    obstacle = parts.obstacle or _head_obstacle(parts.node)
    if obstacle is not None:
        raise NotTracedError(obstacle)
    if parts.rope_inside or parts.key is None:
        return HeadRotation(None, None, parts.node, _rope_width(parts, head_dim, shapes))
    fused = parts.scores is parts.node
    if fused:
        _refuse_longer_keys(parts, head_dim, shapes)
    query_axis = operand_axis(parts.scores, 0, -1, shapes)
    key_axis = operand_axis(parts.scores, 1, -1 if fused else -2, shapes)
    if query_axis is None or key_axis is None:
        raise NotTracedError(f"{label(parts.scores)} turns Q or K, of which the graph does not tell the rank")
    query = after_rope(parts.query, parts.scores, "Q", shapes, head_dim=head_dim, axis=query_axis)
    key = after_rope(parts.key, parts.scores, "K", shapes, head_dim=head_dim, axis=key_axis)
    for place, what in ((query, "Q"), (key, "K")):
        length = place.length
        if length is None and not place.reshaped:
            # Q and K meet in one product, so the heads of both are of one length; an operator knows it itself.
            length = head_dim if fused else key.length
        if length is None:
            raise NotTracedError(f"the last axis of {what} after RoPE has no known length")
        if length % head_dim:
            raise NotTracedError(f"the last axis of {what} after RoPE has length {length}, not heads of {head_dim}")
    return HeadRotation(query.value, key.value)


def _refuse_longer_keys(parts: _Parts, head_dim: int, shapes: Shapes) -> None:
    """A fused operator may take heads of Q and K of another length than those of V: packed, they look alike.

    Raises:
        NotTracedError: It does.
    """
    for value, heads in ((parts.query, parts.num_heads), (parts.key, parts.num_kv_heads or parts.num_heads)):
        length = None if value is None else _head_dim(shapes.of(value), heads or 0)
        if length is not None and length % head_dim:
            raise NotTracedError(f"heads of Q and K have {length} entries and those of V {head_dim}")


def _rope_width(parts: _Parts, head_dim: int, shapes: Shapes) -> int | None:
    """How many entries of a head a GroupQueryAttention's RoPE turns; None where RoPE has ended before.

    The width shows in the tables alone, [positions, width / 2]: weights, or what the graph chooses among several
    (LongRoPE has an If). RoPE taken out of the operator with another width would be another model.
    """
    if not parts.rope_inside:
        return None
    tables = [data_input(parts.node, index) for index in (COS, SIN)]
    constants = [resolve_constant(table) for table in tables]
    widths = {
        shapes.last(table) if constant is None else constant.shape[-1]
        for table, constant in zip(tables, constants, strict=True)
    }
    half = widths.pop()
    if half is None or widths:
        raise NotTracedError(f"the width of RoPE's table {tables[0].name!r} is not to be seen in the graph")
    if 2 * half > head_dim:
        raise NotTracedError(f"RoPE's table {tables[0].name!r} is made for heads of {2 * half}, not of {head_dim}")
    return 2 * half
