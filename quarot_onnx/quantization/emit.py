"""Write quantized Linears and tables in standard operators that onnxruntime fuses.

Static (Q/DQ)::

    x ─ QuantizeLinear ─ DequantizeLinear ─┐
    W(int8) ──────────── DequantizeLinear ─┴─ MatMul ── (+ b)          runs as MatMulIntegerToFloat

Per token, a = max|x| over the last axis, so that x / a fills [-1, 1] and one constant scale serves all rows::

    x ─ Div a ─ QuantizeLinear(1/127, 128) ─ DequantizeLinear ─┐
    W(int8) ──────────────────────────────── DequantizeLinear ─┴─ MatMul ─ Mul a ── (+ b)

Weight-only: DequantizeLinear ─ MatMul, which onnxruntime runs as MatMulNBits; unless its session option
``session.qdq_matmulnbits_accuracy_level`` is 1, that operator rounds activations to 8 bits per block of a row. A table:
Gather of integers, times Gather of the rows' scales.

Activations are quantized in float32 whatever the model's type (QuantizeLinear takes float16 only from opset 19 on).
A Gemm becomes MatMul and Add, its alpha folded into the weight and its beta into the bias.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx import model_io
from quarot_onnx.graph.edit import Editor
from quarot_onnx.graph.linear import Bias, Linear
from quarot_onnx.graph.query import Constant
from quarot_onnx.quantization.rounding import Grid, round_to_nearest

_TINY = np.float32(1e-30)
"""Stands in for the maximum of a row of zeros."""


@dataclass(frozen=True, eq=False)
class PerToken:
    """Quantize each row of the activation by its own maximum, symmetric, 8 bits."""


@dataclass(frozen=True, eq=False)
class Static:
    """Quantize the activation on one fixed grid.

    Attributes:
        grid: Scalar scale and zero point.
    """

    grid: Grid


Activation = PerToken | Static | None
WeightGrid = Callable[[NDArray[np.floating]], Grid]


class Emitter:
    """Rewrites Linears of one graph; Linears that share an input and its grid share its Q/DQ."""

    def __init__(self, model: ir.Model) -> None:
        """Take stock of the graph."""
        self._editor = Editor(model)
        self._opset = model.graph.opset_imports.get("", 1)
        self._quantized: dict[tuple[object, ...], tuple[ir.Value, ir.Value | None]] = {}
        self._constants: dict[tuple[str, bytes], ir.Value] = {}

    def linear(self, linear: Linear, weight: WeightGrid, activation: Activation, output: Static | None = None) -> None:
        """Quantize one Linear in place.

        Args:
            linear: The Linear.
            weight: Gives the grid of W: [in, out].
            activation: How its input is quantized; None for weight-only.
            output: The grid of a Q/DQ after the product and the bias; None for no Q/DQ there.
        """
        node, edit = linear.node, self._editor
        dtype, may_be_matrix = linear.weight.dtype, _may_be_matrix(linear.input)
        w = self._dequantized_weight(linear, weight)
        x = linear.input if not linear.transposed_input else self._add(node, "Transpose", linear.input, perm=[1, 0])
        amax: ir.Value | None = None
        if activation is not None:
            x, amax = self._activation(node, x, dtype, activation)
            dtype_inside = ir.DataType.FLOAT
        else:
            dtype_inside = dtype
            w = w if dtype is ir.DataType.FLOAT else self._add(node, "Cast", w, to=int(dtype))
        product = edit.node("MatMul", [x, w], f"{node.name or 'linear'}/quantized")
        product.metadata_props.update(node.metadata_props)
        tail = [product]
        if amax is not None:
            tail.append(edit.node("Mul", [product.outputs[0], amax], f"{product.name}/Scale"))
        if dtype_inside is not dtype:
            to = ir.AttrInt64("to", int(dtype))
            tail.append(edit.node("Cast", [tail[-1].outputs[0]], f"{product.name}/Cast", attributes=[to]))
        bias = linear.bias
        if bias is not None and bias.node is node:
            tail.append(self._bias(linear, bias, tail))
        edit.replace_node(node, tail)
        last = tail[-1]
        if bias is not None and bias.node is not node:
            last = bias.node
            if len(tail) == 1 and may_be_matrix:
                last = self._bias(linear, bias, tail)
                edit.replace_node(bias.node, [last])
        if output is not None:
            edit.redirect(last.outputs[0], lambda v: self._qdq(v, output.grid, dtype))

    def table(self, node: ir.Node, table: Constant, weight: WeightGrid) -> None:
        """Quantize an embedding: integers and row scales are gathered and multiplied.

        Args:
            node: The Gather.
            table: Its table, seen as [rows, hidden].
            weight: Gives the grid of the table's transpose [hidden, rows], so that rows are its channels.
        """
        edit = self._editor
        grid = weight(_seen(table).T)
        kind = ir.DataType.from_numpy(grid.zero_point.dtype)

        def compute() -> NDArray[np.generic]:
            return np.ascontiguousarray(round_to_nearest(_seen(table).T, grid).T)

        name = table.value.name or "table"
        tensor = model_io.lazy_tensor(compute, dtype=kind, shape=table.shape, name=name)
        edit.replace_input(node, 0, edit.initializer(f"{name}_{kind.name.lower()}", tensor))
        scale, zero = (
            edit.initializer(
                f"{name}_{what}", ir.Tensor(np.ascontiguousarray(array.reshape(-1, 1) if array.ndim else array))
            )
            for what, array in (("scale", grid.scale), ("zero_point", grid.zero_point.astype(np.float32)))
        )
        to = ir.AttrInt64("to", int(ir.DataType.FLOAT))

        def build(value: ir.Value) -> list[ir.Node]:
            nodes = [edit.node("Cast", [value], f"{node.name}/Cast", attributes=[to])]
            real, factor = nodes[0].outputs[0], scale
            if grid.zero_point.any():
                shift = zero
                if grid.scale.ndim:
                    nodes.append(edit.node("Gather", [zero, node.inputs[1]], f"{node.name}/ZeroPoints"))
                    shift = nodes[-1].outputs[0]
                nodes.append(edit.node("Sub", [real, shift], f"{node.name}/Shift"))
                real = nodes[-1].outputs[0]
            if grid.scale.ndim:
                nodes.append(edit.node("Gather", [scale, node.inputs[1]], f"{node.name}/Scales"))
                factor = nodes[-1].outputs[0]
            nodes.append(edit.node("Mul", [real, factor], f"{node.name}/Scale"))
            if table.dtype is not ir.DataType.FLOAT:
                back = ir.AttrInt64("to", int(table.dtype))
                nodes.append(edit.node("Cast", [nodes[-1].outputs[0]], f"{node.name}/Back", attributes=[back]))
            return nodes

        edit.redirect(node.outputs[0], build)
        node.outputs[0].type = ir.TensorType(kind)

    def _dequantized_weight(self, linear: Linear, weight: WeightGrid) -> ir.Value:
        """W as integers with a DequantizeLinear; its grid is found now, its integers when the model is written."""
        constant, alpha = linear.weight, linear.alpha
        grid = weight(_seen(constant, alpha))
        name = constant.value.name or linear.name

        def compute() -> NDArray[np.generic]:
            return np.ascontiguousarray(round_to_nearest(_seen(constant, alpha), grid))

        kind = ir.DataType.from_numpy(grid.zero_point.dtype)
        tensor = model_io.lazy_tensor(compute, dtype=kind, shape=constant.shape, name=name)
        integers = self._editor.initializer(f"{name}_{kind.name.lower()}", tensor)
        scale = self._editor.initializer(f"{name}_scale", ir.Tensor(np.array(grid.scale)))
        zero = self._editor.initializer(f"{name}_zero_point", ir.Tensor(np.array(grid.zero_point)))
        attributes = {"axis": 1} if grid.scale.ndim else {}
        return self._add(linear.node, "DequantizeLinear", integers, scale, zero, **attributes)

    def _activation(
        self, node: ir.Node, x: ir.Value, dtype: ir.DataType, activation: PerToken | Static
    ) -> tuple[ir.Value, ir.Value | None]:
        """The input after Q/DQ, and for per-token the rows' maxima."""
        grid: tuple[bytes, ...] = ()
        if isinstance(activation, Static):
            grid = (activation.grid.scale.tobytes(), activation.grid.zero_point.tobytes())
        key = (x, activation.__class__, *grid)
        if key not in self._quantized:
            # Linears come in graph order, so whoever shares this pair stands further down.
            anchor = node
            if dtype is not ir.DataType.FLOAT:
                x = self._add(anchor, "Cast", x, to=int(ir.DataType.FLOAT))
            if isinstance(activation, Static):
                self._quantized[key] = (self._round_trip(anchor, x, activation.grid), None)
            else:
                self._quantized[key] = self._per_token(anchor, x)
        return self._quantized[key]

    def _per_token(self, anchor: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """X / max|x| through Q/DQ, and max|x|."""
        magnitude = self._add(anchor, "Abs", x)
        if self._opset >= 18:
            axes = self._constant("last_axis", np.array([-1], dtype=np.int64))
            highest = self._add(anchor, "ReduceMax", magnitude, axes, keepdims=1)
        else:
            highest = self._add(anchor, "ReduceMax", magnitude, axes=[-1], keepdims=1)
        amax = self._add(anchor, "Max", highest, self._constant("tiny", np.array(_TINY)))
        unit = self._add(anchor, "Div", x, amax)
        grid = Grid(np.array(1 / 127, dtype=np.float32), np.array(128, dtype=np.uint8))
        return self._round_trip(anchor, unit, grid), amax

    def _round_trip(self, anchor: ir.Node, x: ir.Value, grid: Grid) -> ir.Value:
        """X through QuantizeLinear and DequantizeLinear."""
        scale, zero = self._grid_constants(grid)
        quantized = self._add(anchor, "QuantizeLinear", x, scale, zero)
        return self._add(anchor, "DequantizeLinear", quantized, scale, zero)

    def _qdq(self, value: ir.Value, grid: Grid, dtype: ir.DataType) -> list[ir.Node]:
        """Q/DQ after a value, as nodes for ``redirect``."""
        edit, (scale, zero) = self._editor, self._grid_constants(grid)
        stem = f"{value.name}/output"
        nodes: list[ir.Node] = []
        if dtype is not ir.DataType.FLOAT:
            to = ir.AttrInt64("to", int(ir.DataType.FLOAT))
            nodes.append(edit.node("Cast", [value], f"{stem}/Cast", attributes=[to]))
        source = nodes[-1].outputs[0] if nodes else value
        nodes.append(edit.node("QuantizeLinear", [source, scale, zero], f"{stem}/QuantizeLinear"))
        nodes.append(edit.node("DequantizeLinear", [nodes[-1].outputs[0], scale, zero], f"{stem}/DequantizeLinear"))
        if dtype is not ir.DataType.FLOAT:
            back = ir.AttrInt64("to", int(dtype))
            nodes.append(edit.node("Cast", [nodes[-1].outputs[0]], f"{stem}/Back", attributes=[back]))
        return nodes

    def _bias(self, linear: Linear, bias: Bias, tail: list[ir.Node]) -> ir.Node:
        """What adds beta · b to the last of ``tail``.

        Right after a MatMul of matrices -beta · b is subtracted: onnxruntime would make a Gemm of MatMul and Add, and
        then finds no quantized kernel for it.
        """
        fusible = len(tail) == 1
        factor = -linear.beta if fusible else linear.beta
        constant = bias.constant
        array = (_seen(constant).astype(np.float64) * factor).astype(constant.dtype.numpy())
        value = self._editor.initializer(f"{constant.value.name}_quarot", ir.Tensor(array, dtype=constant.dtype))
        return self._editor.node(
            "Sub" if fusible else "Add", [tail[-1].outputs[0], value], f"{linear.name}/quantized/Bias"
        )

    def _grid_constants(self, grid: Grid) -> tuple[ir.Value, ir.Value]:
        return (
            self._constant("activation_scale", np.array(grid.scale)),
            self._constant("activation_zero_point", np.array(grid.zero_point)),
        )

    def _constant(self, stem: str, array: NDArray[np.generic]) -> ir.Value:
        """A small initializer, shared by equal content."""
        key = (f"{stem}{array.dtype}{array.shape}", array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._editor.initializer(f"quarot/{stem}", ir.Tensor(array))
        return self._constants[key]

    def _add(self, anchor: ir.Node, op_type: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        """Insert a node before ``anchor`` and return its output."""
        attrs = [
            ir.AttrInt64s(key, value) if isinstance(value, list) else ir.AttrInt64(key, value)
            for key, value in attributes.items()
        ]
        made = self._editor.node(op_type, inputs, f"{anchor.name or 'node'}/{op_type}", attributes=attrs)
        self._editor.before(anchor, [made])
        return made.outputs[0]


def _may_be_matrix(x: ir.Value) -> bool:
    """Whether ``x`` may have two axes."""
    return x.shape is None or len(x.shape) == 2


def _seen(constant: Constant, factor: float = 1.0) -> NDArray[np.floating]:
    """A constant as its user sees it, [in, out], times ``factor``."""
    stored = model_io.read_array(constant.tensor)
    array = (stored.T if constant.transposed else stored).astype(constant.dtype.numpy(), copy=False)
    return array if factor == 1.0 else array * np.float32(factor)
