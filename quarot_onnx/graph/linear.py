"""A Linear: a product whose second operand is a constant matrix, with the bias that follows it.

    y = alpha · x W + beta · b,    x: [..., in], W: [in, out], b: [out]

Whatever the graph stores ([in, out], [out, in], behind a Transpose, a Cast or an Identity), a Linear
speaks of W as [in, out]. The product is a MatMul, a Gemm, or what onnxruntime's optimiser makes of a MatMul and its
neighbours, com.microsoft's FusedMatMul (with alpha and transB).
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
from quarot_onnx.io.opsets import STANDARD_DOMAINS

WEIGHT_INPUT = 1

LINEAR_OPS = frozenset({"MatMul", "Gemm", "FusedMatMul"})
"""The operators that may be Linears."""

_FUSED = "FusedMatMul"


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
    """A MatMul, Gemm or FusedMatMul with a constant weight.

    Attributes:
        node: The product; its input 0 is x, its input 1 leads to the weight.
        weight: The weight, seen as [in, out]: ``weight.transposed`` tells whether it is stored [out, in].
        bias: What is added to the product, or None.
        output: The value after the bias.
        transposed_input: A Gemm with transA=1: x comes as [in, rows].
        alpha: Gemm's and FusedMatMul's factor of the product.
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
    def op_type(self) -> str:
        """The operator as configurations name it: a FusedMatMul is a MatMul."""
        return "MatMul" if self.node.op_type == _FUSED else self.node.op_type

    @property
    def stored_transposed(self) -> bool:
        """Whether the node itself transposes its second operand (transB)."""
        return bool(attribute_int(self.node, "transB", 0))

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


def is_matmul(node: ir.Node) -> bool:
    """Whether a node is a MatMul, or onnxruntime's FusedMatMul, of any operands."""
    if node.op_type == _FUSED:
        return node.domain == "com.microsoft"
    return node.op_type == "MatMul" and node.domain in STANDARD_DOMAINS


def linear_at(node: ir.Node) -> Linear | None:
    """The Linear that ``node`` is, or None.

    That is another operator, an operand that is no constant 2-D float weight or an empty one, an online rotation.
    """
    gemm = node.op_type == "Gemm" and node.domain in STANDARD_DOMAINS
    if not (gemm or is_matmul(node)) or is_online(node):
        return None
    weight = resolve_constant(node.inputs[WEIGHT_INPUT])
    if weight is None or len(weight.shape) != 2 or weight.dtype not in FLOAT_TYPES or 0 in weight.shape:
        return None
    if resolve_constant(node.inputs[0]) is not None:
        return None
    if attribute_int(node, "transB", 0):
        weight = Constant(weight.value, weight.tensor, not weight.transposed, weight.dtype)
    alpha = attribute_float(node, "alpha", 1.0)
    if gemm:
        return _gemm(node, weight, alpha)
    if any(attribute_int(node, name, 0) for name in ("transA", "transBatchA", "transBatchB")):
        return None  # x turned inside: only a Gemm's x, which is a matrix, can be turned back
    bias = _bias_after(node, weight.shape[1])
    return Linear(node, weight, bias, bias.node.outputs[0] if bias else node.outputs[0], alpha=alpha)


def _gemm(node: ir.Node, weight: Constant, alpha: float) -> Linear | None:
    """A Gemm whose bias, if it has one, is constant."""
    bias = None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        constant = resolve_constant(node.inputs[2])
        if constant is None:
            return None
        bias = Bias(constant, node, 2)
    transposed = bool(attribute_int(node, "transA", 0))
    beta = attribute_float(node, "beta", 1.0)
    return Linear(node, weight, bias, node.outputs[0], transposed_input=transposed, alpha=alpha, beta=beta)


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
    if add.op_type != "Add" or add.graph is not node.graph:  # in a branch of an If, or a Loop's body
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
