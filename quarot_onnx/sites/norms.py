"""Recognise an RMSNorm in any spelling: x · rsqrt(mean(x²) + ε) · γ (Zhang and Sennrich 2019, equation 4).

Fused: SimplifiedLayerNormalization, SkipSimplifiedLayerNormalization (onnxruntime), RMSNormalization (opset 23).
Spelt out, with Casts anywhere::

    x ─┬─ Pow 2 or Mul x ── ReduceMean(-1) ── Add ε ── Sqrt ─┬─ Reciprocal or Div 1 ── Mul x ─┬─ Mul γ
       └─────────────────────────────────────────────────────┴─ Div x ────────────────────────┘

or with Pow -0.5 in place of Sqrt and Reciprocal. γ may be 1 + weight (Gemma).
"""

from collections.abc import Iterator

import onnx_ir as ir

from quarot_onnx.graph.query import (
    Constant,
    attribute_ints,
    consumers_through,
    data_input,
    is_op,
    resolve_constant,
    scalar,
    small_ints,
    through,
)
from quarot_onnx.sites.model import Norm

FUSED = frozenset({"SimplifiedLayerNormalization", "RMSNormalization"})
SKIP = "SkipSimplifiedLayerNormalization"
LAYER_NORMS = frozenset({"LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization"})


def fused_norm(node: ir.Node) -> Norm | None:
    """The Norm that a fused operator is, or None."""
    if node.op_type in FUSED:
        gamma = resolve_constant(node.inputs[1])
        return None if gamma is None else Norm(
            node, data_input(node), node.outputs[0], gamma, (node, 1), reads=frozenset({node})
        )
    if node.op_type == SKIP:
        gamma = resolve_constant(node.inputs[2])
        biased = len(node.inputs) > 3 and node.inputs[3] is not None
        if gamma is None or biased:
            return None
        total = node.outputs[3] if len(node.outputs) > 3 and node.outputs[3].name else None
        return Norm(
            node, data_input(node), node.outputs[0], gamma, (node, 2), skip_sum=total, reads=frozenset({node})
        )
    return None


def spelt_norms(graph: ir.Graph) -> Iterator[Norm]:
    """All spelt-out RMSNorms of a graph, each anchored at its ReduceMean."""
    for node in graph:
        if node.op_type == "ReduceMean":
            norm = _spelt_norm(node)
            if norm is not None:
                yield norm


def is_centred_mean(node: ir.Node) -> bool:
    """Whether a ReduceMean takes the mean of x itself to subtract it: a LayerNorm, not an RMSNorm."""
    return is_op(node, "ReduceMean") and any(is_op(user, "Sub") for user, _ in consumers_through(node.outputs[0]))


def _spelt_norm(mean: ir.Node) -> Norm | None:
    """Follow one ReduceMean back to x and on to the product with γ."""
    square = through(data_input(mean)).producer()
    x = _squared(square)
    if square is None or x is None or _axes(mean) != (-1,):
        return None
    add = _only(mean.outputs[0], "Add")
    if add is None or not any(scalar(v) is not None for v in add.inputs):
        return None
    scaled = _scaled(add.outputs[0], x)
    return None if scaled is None else _with_gamma(scaled, x, frozenset({square, scaled}))


def _squared(node: ir.Node | None) -> ir.Value | None:
    """X of the node that computes x², or None."""
    if node is None:
        return None
    if node.op_type == "Pow" and scalar(node.inputs[1]) == 2.0:
        return through(data_input(node))
    if node.op_type == "Mul" and through(data_input(node, 0)) is through(data_input(node, 1)):
        return through(data_input(node))
    return None


def _axes(mean: ir.Node) -> tuple[int, ...] | None:
    """The axes of a reduction, as attribute (before opset 18) or as input."""
    if len(mean.inputs) > 1 and mean.inputs[1] is not None:
        return small_ints(mean.inputs[1])
    return attribute_ints(mean, "axes")


def _only(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The single user of ``value`` beyond Casts, if it is one of ``op_types``."""
    users = [node for node, _ in consumers_through(value)]
    return users[0] if len(users) == 1 and users[0].op_type in op_types else None


def _scaled(variance: ir.Value, x: ir.Value) -> ir.Node | None:
    """The node that multiplies x by rsqrt(variance)."""
    root = _only(variance, "Sqrt", "Pow")
    if root is None:
        return None
    if root.op_type == "Pow":
        return _product(root.outputs[0], x, "Mul") if scalar(root.inputs[1]) == -0.5 else None
    inverse = _only(root.outputs[0], "Reciprocal", "Div")
    if inverse is None:
        return None
    if inverse.op_type == "Div" and scalar(inverse.inputs[0]) != 1.0:
        return inverse if through(data_input(inverse, 0)) is x else None
    return _product(inverse.outputs[0], x, "Mul")


def _product(factor: ir.Value, x: ir.Value, op_type: str) -> ir.Node | None:
    """The single user of ``factor``, if it combines it with x."""
    node = _only(factor, op_type)
    return node if node is not None and any(v is not None and through(v) is x for v in node.inputs) else None


def _with_gamma(scaled: ir.Node, x: ir.Value, reads: frozenset[ir.Node]) -> Norm:
    """The norm with its γ: the scaled value's only user, a Mul by a constant vector or by 1 + vector."""
    mul = _only(scaled.outputs[0], "Mul")
    if mul is not None:
        for index in (0, 1):
            if through(data_input(mul, 1 - index)) is not through(scaled.outputs[0]):
                continue
            gamma, offset = _gamma(data_input(mul, index))
            if gamma is not None and len(gamma.shape) == 1:
                return Norm(mul, x, mul.outputs[0], gamma, (mul, index), offset, reads=reads)
    return Norm(scaled, x, scaled.outputs[0], None, None, reads=reads)


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
            if offset is not None and constant is not None:
                return constant, offset
    return None, 0.0
