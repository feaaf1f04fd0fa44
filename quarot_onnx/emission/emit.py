"""Write quantized Linears and tables in operators that onnxruntime fuses.

Static (Q/DQ)::

    x ─ QuantizeLinear ─ DequantizeLinear ─┐
    W(int8) ──────────── DequantizeLinear ─┴─ MatMul ── (+ b)          runs as MatMulIntegerToFloat

Per token, a = max|x| over the last axis, so that x / a fills [-1, 1] and one constant scale serves all rows::

    x ─ Div a ─ QuantizeLinear(1/127, 128) ─ DequantizeLinear ─┐
    W(int8) ──────────────────────────────── DequantizeLinear ─┴─ MatMul ─ Mul a ── (+ b)

Weight-only: DequantizeLinear ─ MatMul, which onnxruntime runs as MatMulNBits; unless its session option
``session.qdq_matmulnbits_accuracy_level`` is 1, that operator rounds activations to 8 bits per block of a row. A table:
Gather of integers, times Gather of the rows' scales.

Low bits (``StoredWeight.format``) come as INT4 ─ Cast ─ DequantizeLinear in the patterns above, as MatMulNBits, as 8
bits, or as real numbers with activations that are rounded and go on in float. A weight that stays as it is, in the
model's own type, leaves all of its Linear but the input, which is rounded and goes on in that type.

A Gemm becomes a product and an Add, its alpha folded into the weight and its beta into the bias.
"""

import numpy as np
import onnx_ir as ir

from quarot_onnx.config.choices import OutputFormat
from quarot_onnx.emission.activation import ActivationWriter
from quarot_onnx.emission.formats import StoredWeight
from quarot_onnx.emission.table import TableWriter
from quarot_onnx.emission.weight import WeightWriter
from quarot_onnx.emission.writer import Writer
from quarot_onnx.graph.linear import Bias, Linear
from quarot_onnx.graph.query import Constant, seen
from quarot_onnx.quantization.activations import Activation, FakePerToken, FakeQuantized, PerToken, Static
from quarot_onnx.quantization.grids import Grid


class Emitter:
    """Rewrites Linears of one graph; Linears that share an input and its grid share its Q/DQ."""

    def __init__(self, model: ir.Model) -> None:
        """Take stock of the graph."""
        self._writer = Writer(model)
        self._editor = self._writer.editor
        self._activations = ActivationWriter(self._writer)
        self._weights = WeightWriter(self._writer)
        self._tables = TableWriter(self._writer)

    def linear(
        self, linear: Linear, weight: StoredWeight | None, activation: Activation, output: Static | None = None
    ) -> None:
        """Quantize one Linear in place.

        Args:
            linear: The Linear.
            weight: The integers of alpha · W: [in, out], and their format; None leaves it as it is.
            activation: How its input is quantized; None for weight-only.
            output: The grid of a Q/DQ after the product and the bias; None for no Q/DQ there, and beside a weight that
                stays.

        Raises:
            ConfigError: 4-bit integers beside 8-bit activations, and the model's opset cannot be raised for them.
        """
        _check(linear, weight, activation)
        if weight is None:
            assert output is None, output
            self._input_alone(linear, activation)
            return
        node, edit = linear.node, self._editor
        dtype, may_be_matrix = linear.weight.dtype, _may_be_matrix(linear.input)
        tail = self._product(linear, weight, activation)
        # Only this product, and only right before the bias, would become a float Gemm where it must not.
        fusible = len(tail) == 1 and tail[0].op_type == "MatMul" and not _is_real(weight)
        bias = linear.bias
        if bias is not None and bias.node is node:
            tail.append(self._bias(linear, bias, tail, negated=fusible))
        edit.replace_node(node, tail)
        last = tail[-1]
        if bias is not None and bias.node is not node:
            last = bias.node
            if fusible and may_be_matrix:
                last = self._bias(linear, bias, tail, negated=True)
                edit.replace_node(bias.node, [last])
        if output is not None:
            edit.redirect(last.outputs[0], lambda v: self._qdq(v, output.grid, dtype))

    def table(self, node: ir.Node, table: Constant, weight: StoredWeight) -> None:
        """Quantize an embedding.

        Args:
            node: The Gather.
            table: Its table, seen as [rows, hidden].
            weight: The integers of the table's transpose [hidden, rows], so that rows are its channels; their format.
        """
        rows, hidden = table.shape
        assert weight.rounded.shape == (hidden, rows), (weight.rounded.shape, table.shape)
        self._tables.write(node, table, weight)

    def _input_alone(self, linear: Linear, activation: Activation) -> None:
        """Round the input of a Linear, which otherwise stays what it is."""
        node, dtype, x = linear.node, linear.weight.dtype, linear.input
        assert activation is not None, "nothing would be quantized"
        if linear.transposed_input:
            x = self._writer.add(node, "Transpose", x, perm=[1, 0])
        x, amax = self._activations.quantized(node, x, dtype, activation)
        if amax is not None:
            x = self._writer.add(node, "Mul", x, amax)
        x = self._writer.cast(node, x, ir.DataType.FLOAT, dtype)
        if linear.transposed_input:
            x = self._writer.add(node, "Transpose", x, perm=[1, 0])
        self._editor.replace_input(node, 0, x)

    def _product(self, linear: Linear, weight: StoredWeight, activation: Activation) -> list[ir.Node]:
        """The nodes, not yet inserted, from the product to its result in the Linear's own type."""
        node, edit, dtype, x = linear.node, self._editor, linear.weight.dtype, linear.input
        if linear.transposed_input:
            x = self._writer.add(node, "Transpose", x, perm=[1, 0])
        stem, inside, amax = f"{node.name or 'linear'}/quantized", ir.DataType.FLOAT, None
        if _is_blocked(weight, activation):
            product = self._weights.blocked(linear, weight, self._activations.as_float(node, x, dtype), stem)
        else:
            if activation is None:
                inside = dtype
            else:
                x, amax = self._activations.quantized(node, x, dtype, activation)
            if isinstance(activation, FakeQuantized):
                x, inside = self._writer.cast(node, x, inside, dtype), dtype
            product = edit.node("MatMul", [x, self._weight(linear, weight, inside)], stem)
        product.metadata_props.update(node.metadata_props)
        tail = [product]
        if amax is not None:
            tail.append(edit.node("Mul", [product.outputs[0], amax], f"{product.name}/Scale"))
        if inside is not dtype:
            tail.append(self._writer.cast_node(tail[-1].outputs[0], dtype, f"{product.name}/Cast"))
        return tail

    def _weight(self, linear: Linear, weight: StoredWeight, dtype: ir.DataType) -> ir.Value:
        """W in ``dtype``."""
        if _is_real(weight):
            return self._weights.real(linear, weight, dtype)
        value = self._weights.dequantized(linear, weight)
        return self._writer.cast(linear.node, value, ir.DataType.FLOAT, dtype)

    def _qdq(self, value: ir.Value, grid: Grid, dtype: ir.DataType) -> list[ir.Node]:
        """Q/DQ after a value, as nodes for ``redirect``."""
        edit, (scale, zero) = self._editor, self._activations.grid_constants(grid)
        stem = f"{value.name}/output"
        nodes: list[ir.Node] = []
        if dtype is not ir.DataType.FLOAT:
            nodes.append(self._writer.cast_node(value, ir.DataType.FLOAT, f"{stem}/Cast"))
        source = nodes[-1].outputs[0] if nodes else value
        nodes.append(edit.node("QuantizeLinear", [source, scale, zero], f"{stem}/QuantizeLinear"))
        nodes.append(edit.node("DequantizeLinear", [nodes[-1].outputs[0], scale, zero], f"{stem}/DequantizeLinear"))
        if dtype is not ir.DataType.FLOAT:
            nodes.append(self._writer.cast_node(nodes[-1].outputs[0], dtype, f"{stem}/Back"))
        return nodes

    def _bias(self, linear: Linear, bias: Bias, tail: list[ir.Node], *, negated: bool) -> ir.Node:
        """What adds beta · b to the last of ``tail``.

        Right after a MatMul of matrices -beta · b is subtracted: onnxruntime would make a Gemm of MatMul and Add, and
        then finds no quantized kernel for it.
        """
        factor = -linear.beta if negated else linear.beta
        constant = bias.constant
        array = (seen(constant).astype(np.float64) * factor).astype(constant.dtype.numpy())
        value = self._editor.initializer(f"{constant.value.name}_quarot", ir.Tensor(array, dtype=constant.dtype))
        return self._editor.node(
            "Sub" if negated else "Add", [tail[-1].outputs[0], value], f"{linear.name}/quantized/Bias"
        )


def _check(linear: Linear, weight: StoredWeight | None, activation: Activation) -> None:
    """Hold our own callers to what the formats can do."""
    if weight is None:
        _check_groups(linear, activation)
        return
    assert weight.rounded.shape == linear.weight.shape, (weight.rounded.shape, linear.weight.shape)
    match weight.format:
        case OutputFormat.W4A8:
            assert isinstance(activation, PerToken | Static), activation
        case OutputFormat.NBITS:
            assert activation is None, activation
        case OutputFormat.QDQ | OutputFormat.W8:
            assert not isinstance(activation, FakeQuantized), activation
        case OutputFormat.FAKE:
            _check_groups(linear, activation)


def _check_groups(linear: Linear, activation: Activation) -> None:
    group = activation.group_size if isinstance(activation, FakePerToken) else None
    assert linear.in_features % (group or 1) == 0, (linear.in_features, group)


def _is_blocked(given: StoredWeight, activation: Activation) -> bool:
    return given.format is OutputFormat.NBITS or (given.format is OutputFormat.W8 and activation is None)


def _is_real(weight: StoredWeight) -> bool:
    return weight.format is OutputFormat.FAKE


def _may_be_matrix(x: ir.Value) -> bool:
    """Whether ``x`` may have two axes."""
    return x.shape is None or len(x.shape) == 2
