"""A Linear: a MatMul or Gemm whose second operand is a constant matrix, with the bias that follows it.

    y = alpha · x W + beta · b,    x: [..., in], W: [in, out], b: [out]

Whatever the graph stores ([in, out], [out, in], behind a Transpose, a Cast or an Identity), a Linear
speaks of W as [in, out].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from quarot_onnx.graph.query import (
    FLOAT_TYPES,
    Constant,
    attribute_float,
    attribute_int,
    consumers,
    data_input,
    label,
    resolve_constant,
    through,
)
from quarot_onnx.graph.tags import is_online

WEIGHT_INPUT = 1


@dataclass(frozen=True, eq=False)
class Bias:
    """A constant vector added to a Linear's output.

    Attributes:
        constant: The vector, [out] (or [1, out]).
        node: The Add after the MatMul, or the Gemm itself.
        index: Which input of ``node`` it is.
    """

    constant: Constant
    node: ir.Node
    index: int


@dataclass(frozen=True, eq=False)
class Linear:
    """A MatMul or Gemm with a constant weight.

    Attributes:
        node: The MatMul or Gemm; its input 0 is x, its input 1 leads to the weight.
        weight: The weight, seen as [in, out]: ``weight.transposed`` tells whether it is stored [out, in].
        bias: What is added to the product, or None.
        output: The value after the bias.
        transposed_input: A Gemm with transA=1: x comes as [in, rows].
        alpha: Gemm's factor of the product.
        beta: Gemm's factor of the bias.
    """

    node: ir.Node
    weight: Constant
    bias: Bias | None
    output: ir.Value
    transposed_input: bool = False
    alpha: float = 1.0
    beta: float = 1.0

    @property
    def name(self) -> str:
        """The node's name as messages give it."""
        return label(self.node)

    @property
    def input(self) -> ir.Value:
        """The activation x."""
        return data_input(self.node, 0)

    @property
    def in_features(self) -> int:
        """The length of W's first axis."""
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        """The length of W's second axis."""
        return self.weight.shape[1]

    @property
    def bias_is_spread(self) -> bool:
        """Whether one number of the bias serves all outputs (Gemm broadcasts it): it cannot be rotated."""
        return self.bias is not None and self.bias.constant.shape[-1:] != (self.out_features,)


def linear_at(node: ir.Node) -> Linear | None:
    """The Linear that ``node`` is, or None (another operator, no constant 2-D float weight, an online rotation)."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm") or is_online(node):
        return None
    weight = resolve_constant(node.inputs[WEIGHT_INPUT])
    if weight is None or len(weight.shape) != 2 or weight.dtype not in FLOAT_TYPES:
        return None
    if resolve_constant(node.inputs[0]) is not None:
        return None
    if node.op_type == "MatMul":
        bias = _bias_after(node, weight.shape[1])
        output = bias.node.outputs[0] if bias else node.outputs[0]
        return Linear(node, weight, bias, output)
    if attribute_int(node, "transB", 0):
        weight = Constant(weight.value, weight.tensor, not weight.transposed, weight.dtype)
    bias, output = None, node.outputs[0]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        constant = resolve_constant(node.inputs[2])
        if constant is None:
            return None
        bias = Bias(constant, node, 2)
    return Linear(
        node,
        weight,
        bias,
        output,
        transposed_input=bool(attribute_int(node, "transA", 0)),
        alpha=attribute_float(node, "alpha", 1.0),
        beta=attribute_float(node, "beta", 1.0),
    )


def linears(graph: ir.Graph) -> Iterator[Linear]:
    """All Linears of a graph, in graph order."""
    for node in graph:
        linear = linear_at(node)
        if linear is not None:
            yield linear


def _bias_after(node: ir.Node, out_features: int) -> Bias | None:
    """The Add of a constant [out] vector that is the only user of a MatMul's output."""
    uses = consumers(node.outputs[0])
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    add, index = uses[0]
    if add.op_type != "Add":
        return None
    constant = resolve_constant(add.inputs[1 - index])
    if constant is None or constant.shape[-1:] != (out_features,) or _size(constant) != out_features:
        return None
    return Bias(constant, add, 1 - index)


def _size(constant: Constant) -> int:
    size = 1
    for length in constant.shape:
        size *= length
    return size


def linear_producing(value: ir.Value) -> Linear | None:
    """The Linear whose output (after its bias, up to Casts) ``value`` is, or None."""
    node = through(value).producer()
    if node is None:
        return None
    if node.op_type == "Add":
        for candidate in node.inputs:
            producer = None if candidate is None else candidate.producer()
            linear = None if producer is None else linear_at(producer)
            if linear is not None and linear.bias is not None and linear.bias.node is node:
                return linear
        return None
    linear = linear_at(node)
    return linear if linear is not None and linear.output is node.outputs[0] else None
