"""Recognise an RMSNorm in any spelling: x · rsqrt(mean(x²) + ε) · γ (Zhang and Sennrich 2019, equation 4).

Fused: SimplifiedLayerNormalization, SkipSimplifiedLayerNormalization (onnxruntime), RMSNormalization (opset 23).
Spelt out, with Casts anywhere::

    x ─┬─ Pow 2 or Mul x ── ReduceMean(-1) ── Add ε ── Sqrt ─┬─ Reciprocal or Div 1 ── Mul x ─┬─ Mul γ
       └─────────────────────────────────────────────────────┴─ Div x ────────────────────────┘

or with Pow 0.5 or -0.5 in place of Sqrt or of both. γ may be 1 + weight (Gemma).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import onnx_ir as ir

from quarot_onnx.graph.query import (
    Constant,
    attribute_int,
    attribute_ints,
    consumers_through,
    data_input,
    resolve_constant,
    scalar,
    small_ints,
    through,
)
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.sites.model import Norm

FUSED = frozenset({"SimplifiedLayerNormalization", "RMSNormalization"})
SKIP = "SkipSimplifiedLayerNormalization"
SKIPS = frozenset({SKIP, "SkipLayerNormalization"})
"""Norms that add two values first."""

SKIP_SUM = 3
"""Which output of theirs is the sum."""

LAYER_NORMS = frozenset({"LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization"})


def fused_norm(node: ir.Node, shapes: Shapes | None = None) -> Norm | None:
    """The Norm that a fused operator is, or None; ``shapes`` helps with axes counted from the front."""
    if node.op_type not in (*FUSED, SKIP):
        return None
    position = 2 if node.op_type == SKIP else 1
    gamma, offset = _gamma(data_input(node, position))
    biased = node.op_type == SKIP and len(node.inputs) > 3 and node.inputs[3] is not None
    axis = attribute_int(node, "axis", -1)
    if gamma is None or len(gamma.shape) != 1 or biased or not _is_last(axis, data_input(node), shapes):
        return None
    use = (node, position)
    return Norm(node, data_input(node), node.outputs[0], gamma, use, offset, reads=frozenset({node}))


def spelt_norms(graph: ir.Graph, shapes: Shapes | None = None) -> Iterator[Norm]:
    """All spelt-out RMSNorms of a graph, found at their ReduceMean; ``shapes`` as in ``fused_norm``."""
    for node in graph:
        if node.op_type == "ReduceMean":
            yield from _spelt_norms_at(node, shapes)


def is_centred_mean(node: ir.Node) -> bool:
    """Whether a ReduceMean takes the mean of x itself to subtract it: a LayerNorm, not an RMSNorm."""
    return node.op_type == "ReduceMean" and any(user.op_type == "Sub" for user, _ in consumers_through(node.outputs[0]))


def is_centring(node: ir.Node) -> bool:
    """Whether ``node`` is the x - mean(x) of a LayerNorm, which is reported at its ReduceMean."""
    means = (through(value).producer() for value in node.inputs if value is not None)
    return node.op_type == "Sub" and any(mean is not None and mean.op_type == "ReduceMean" for mean in means)


def _spelt_norms_at(mean: ir.Node, shapes: Shapes | None) -> Sequence[Norm]:
    """Follow one ReduceMean back to x and on to the product with γ, or with the γ of several norms that share it."""
    square = through(data_input(mean)).producer()
    x = _squared(square)
    if square is None or x is None or not _over_last_axis(mean, shapes):
        return ()
    if any(user.op_type != "ReduceMean" for user, _ in consumers_through(square.outputs[0])):
        return ()  # x² is wanted itself, which changes with x
    add = _only(mean.outputs[0], "Add")
    if add is None or not any(scalar(v) is not None for v in add.inputs):
        return ()
    scaled = _scaled(add.outputs[0], x)
    return () if scaled is None else _with_gammas(scaled, x, frozenset({square, scaled}))


def _squared(node: ir.Node | None) -> ir.Value | None:
    """X of the node that computes x², or None."""
    if node is None:
        return None
    if node.op_type == "Pow" and scalar(node.inputs[1]) == 2.0:
        return through(data_input(node))
    if node.op_type == "Mul" and through(data_input(node, 0)) is through(data_input(node, 1)):
        return through(data_input(node))
    return None


def _over_last_axis(mean: ir.Node, shapes: Shapes | None) -> bool:
    """Whether a reduction's axes, an attribute before opset 18 and an input since, are the last one alone."""
    given = len(mean.inputs) > 1 and mean.inputs[1] is not None
    axes = small_ints(mean.inputs[1]) if given else attribute_ints(mean, "axes")
    return axes is not None and len(axes) == 1 and _is_last(axes[0], data_input(mean), shapes)


def _is_last(axis: int, value: ir.Value, shapes: Shapes | None) -> bool:
    """Whether an axis is the last of a value, as far as it is known how many there are."""
    declared = None if value.shape is None else len(value.shape)
    rank = declared if shapes is None else shapes.rank(value)
    return axis == -1 or (rank is not None and axis == rank - 1)


def _only(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The single user of ``value`` beyond Casts, if it is one of ``op_types``."""
    users = [node for node, _ in consumers_through(value)]
    return users[0] if len(users) == 1 and users[0].op_type in op_types else None


def _scaled(variance: ir.Value, x: ir.Value) -> ir.Node | None:
    """The node that multiplies x by rsqrt(variance)."""
    root = _only(variance, "Sqrt", "Pow")
    if root is None:
        return None
    exponent = 0.5 if root.op_type == "Sqrt" else scalar(root.inputs[1])
    if exponent == -0.5:
        return _product(root.outputs[0], x)
    if exponent != 0.5:
        return None
    inverse = _only(root.outputs[0], "Reciprocal", "Div")
    if inverse is None:
        return None
    if inverse.op_type == "Div" and scalar(inverse.inputs[0]) != 1.0:
        return inverse if through(data_input(inverse, 0)) is x else None
    return _product(inverse.outputs[0], x)


def _product(factor: ir.Value, x: ir.Value) -> ir.Node | None:
    """The Mul by x that is the single user of ``factor``."""
    node = _only(factor, "Mul")
    return node if node is not None and any(v is not None and through(v) is x for v in node.inputs) else None


def _with_gammas(scaled: ir.Node, x: ir.Value, reads: frozenset[ir.Node]) -> Sequence[Norm]:
    """The norm with its γ, or those with each a γ: every user of the scaled value is a Mul by a vector, or none is.

    A γ may be 1 + vector.
    """
    users = [user for user, _ in consumers_through(scaled.outputs[0])]
    found = [norm for user in users if (norm := _at_gamma(user, scaled, x, reads)) is not None]
    if found and len(found) == len(users) and not scaled.outputs[0].is_graph_output():
        return found
    return (Norm(scaled, x, scaled.outputs[0], None, None, reads=reads),)


def _at_gamma(mul: ir.Node, scaled: ir.Node, x: ir.Value, reads: frozenset[ir.Node]) -> Norm | None:
    """The norm that ends with ``mul``, or None where that is no product with a γ."""
    if mul.op_type != "Mul":
        return None
    for index in (0, 1):
        if through(data_input(mul, 1 - index)) is not through(scaled.outputs[0]):
            continue
        gamma, offset = _gamma(data_input(mul, index))
        if gamma is not None and len(gamma.shape) == 1:
            return Norm(mul, x, mul.outputs[0], gamma, (mul, index), offset, reads=reads)
    return None


def _gamma(value: ir.Value) -> tuple[Constant | None, float]:
    """A constant γ, and what is added to it on the way."""
    constant = resolve_constant(value)
    if constant is not None:
        return constant, 0.0
    node = through(value).producer()
    if node is not None and node.op_type == "Add":
        for index in (0, 1):
            offset = scalar(node.inputs[1 - index])
            constant = resolve_constant(node.inputs[index])
            if offset is not None and constant is not None and len(constant.shape) == 1:
                return replace(constant, dtype=_type_after_casts(value, constant.dtype)), offset
    return None, 0.0


def _type_after_casts(value: ir.Value, dtype: ir.DataType) -> ir.DataType:
    """The type of ``value``, where ``dtype`` is that before the Casts that it passed through."""
    node = value.producer()
    while node is not None and node.op_type == "Identity":
        node = data_input(node).producer()
    return ir.DataType(attribute_int(node, "to", 0)) if node is not None and node.op_type == "Cast" else dtype
