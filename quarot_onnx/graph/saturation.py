"""Products of uint8 activations and int8 weights in a quantized graph, whoever quantized it.

Those with weights beyond ±64 saturate on processors without VNNI (:mod:`quarot_onnx.processor`).
"""

from collections.abc import Iterator

import onnx_ir as ir

from quarot_onnx.graph.query import label, resolve_constant
from quarot_onnx.io.nodes import all_nodes
from quarot_onnx.io.tensors import read_array
from quarot_onnx.processor import LARGEST_SAFE, saturates

_WEIGHT_INPUTS = {
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
    "ConvInteger": 1,
    "QLinearMatMul": 3,
    "QGemm": 3,
    "QLinearConv": 3,
}
"""Operators on integers, and which of their inputs is the weight."""

_FUSED = frozenset({"MatMul", "Gemm", "Conv"})
"""Operators that onnxruntime makes one of these of, where both operands come from a DequantizeLinear."""


def saturable_products(model: ir.Model) -> list[str]:
    """The names of the nodes whose products saturate on processors without VNNI.

    Reads int8 weights, one at a time.
    """
    return [label(node) for node in all_nodes(model.graph) if _saturable(node)]


def saturating_here(model: ir.Model) -> int:
    """How many products of a model saturate on this processor, unless they are computed exactly."""
    return len(saturable_products(model)) if saturates() else 0


def _saturable(node: ir.Node) -> bool:
    return any(_is_large(value) for value in _weights(node))


def _weights(node: ir.Node) -> Iterator[ir.Value | None]:
    """What is multiplied, as integers, with an activation that may be uint8."""
    if node.op_type in _WEIGHT_INPUTS:
        index = _WEIGHT_INPUTS[node.op_type]
        yield node.inputs[index] if index < len(node.inputs) else None
    elif node.op_type in _FUSED and len(node.inputs) > 1:
        activation, weight = (_dequantize(value) for value in node.inputs[:2])
        if activation is not None and weight is not None and _may_be_uint8(activation):
            yield weight.inputs[0]


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value comes from."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _may_be_uint8(dequantize: ir.Node) -> bool:
    """Whether integers are uint8, as their zero point has it, or as it does not tell."""
    zero = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    constant = resolve_constant(zero)
    return constant is None or constant.dtype is ir.DataType.UINT8


def _is_large(value: ir.Value | None) -> bool:
    """Whether ``value`` is a constant of int8 beyond what is safe."""
    tensor = None if value is None or value.producer() is not None else value.const_value
    if tensor is None or tensor.dtype is not ir.DataType.INT8 or tensor.size == 0:
        return False
    array = read_array(tensor)
    return bool(array.max() > LARGEST_SAFE or array.min() < -LARGEST_SAFE)
