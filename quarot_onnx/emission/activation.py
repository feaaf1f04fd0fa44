"""Activations as nodes, operation for operation what ``quantization.activations`` computes in NumPy.

All of it is float32 whatever the model's type: QuantizeLinear takes float16 only from opset 19 on.
"""

import numpy as np
import onnx_ir as ir

from quarot_onnx.emission.opset import raise_opset
from quarot_onnx.emission.writer import Writer
from quarot_onnx.quantization.activations import (
    TINY,
    UNIT_GRID,
    FakePerToken,
    FakeQuantized,
    FakeStatic,
    PerToken,
    Static,
)
from quarot_onnx.quantization.grids import Grid

Written = tuple[ir.Value, ir.Value | None]
"""The float32 activation after quantization and back, and what the product must be multiplied by."""


class ActivationWriter:
    """Writes each (value, way of quantizing) once."""

    def __init__(self, writer: Writer) -> None:
        """Write with ``writer``."""
        self._writer = writer
        self._written: dict[tuple[object, ...], Written] = {}

    def quantized(
        self,
        anchor: ir.Node,
        x: ir.Value,
        dtype: ir.DataType,
        activation: PerToken | Static | FakePerToken | FakeStatic,
    ) -> Written:
        """The input ``x`` of type ``dtype`` after quantization and back, in float32."""
        what: tuple[object, ...] = (activation,)
        if isinstance(activation, Static):
            what = (Static, activation.grid.scale.tobytes(), activation.grid.zero_point.tobytes())
        key = (x, *what)
        if key not in self._written:
            # Linears come in graph order, so whoever shares these nodes stands further down.
            real = self.as_float(anchor, x, dtype)
            match activation:
                case PerToken(clip_ratio=clip_ratio):
                    self._written[key] = self._per_token(anchor, real, clip_ratio)
                case Static(grid=grid):
                    self._written[key] = (self.round_trip(anchor, real, grid), None)
                case FakePerToken():
                    self._written[key] = (self._fake(anchor, real, activation), None)
                case FakeStatic():
                    self._written[key] = (self._fake_static(anchor, real, activation), None)
        return self._written[key]

    def as_float(self, anchor: ir.Node, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``x`` as float32."""
        if dtype is ir.DataType.FLOAT:
            return x
        key = (x, "float32")
        if key not in self._written:
            self._written[key] = (self._writer.add(anchor, "Cast", x, to=int(ir.DataType.FLOAT)), None)
        return self._written[key][0]

    def round_trip(self, anchor: ir.Node, x: ir.Value, grid: Grid) -> ir.Value:
        """``x`` through QuantizeLinear and DequantizeLinear."""
        if grid.zero_point.dtype.itemsize > 1:
            raise_opset(self._writer.editor, "16-bit activations", "8 bits")
        scale, zero = self.grid_constants(grid)
        quantized = self._writer.add(anchor, "QuantizeLinear", x, scale, zero)
        return self._writer.add(anchor, "DequantizeLinear", quantized, scale, zero)

    def grid_constants(self, grid: Grid) -> tuple[ir.Value, ir.Value]:
        """The scale and the zero point of a grid."""
        return (
            self._writer.constant("activation_scale", np.array(grid.scale)),
            self._writer.constant("activation_zero_point", np.array(grid.zero_point)),
        )

    def _per_token(self, anchor: ir.Node, x: ir.Value, clip_ratio: float) -> tuple[ir.Value, ir.Value]:
        """X / a through Q/DQ, and a = clip · max|x|."""
        add = self._writer.add
        highest = self._clipped(anchor, self._writer.reduced(anchor, "ReduceMax", add(anchor, "Abs", x)), clip_ratio)
        amax = add(anchor, "Max", highest, self._writer.number("tiny", TINY))
        return self.round_trip(anchor, add(anchor, "Div", x, amax), UNIT_GRID), amax

    def _fake(self, anchor: ir.Node, x: ir.Value, kind: FakePerToken) -> ir.Value:
        """The values of ``x`` on the grids of its rows or groups."""
        add = self._writer.add
        rows = x
        if kind.group_size is not None:
            shape = self._writer.constant("groups", np.array([-1, kind.group_size], np.int64))
            rows = add(anchor, "Reshape", x, shape)
        if kind.symmetric:
            scale, zero = self.row_scales(anchor, rows, kind), None
        else:
            scale, zero = self._asymmetric(anchor, rows, kind)
        real = self._on_grid(anchor, rows, scale, zero, kind)
        if kind.group_size is None:
            return real
        # Without allowzero a shape with no rows would be read as "as many as before".
        exact = {"allowzero": 1} if self._writer.opset >= 14 else {}
        return add(anchor, "Reshape", real, add(anchor, "Shape", x), **exact)

    def _fake_static(self, anchor: ir.Node, x: ir.Value, kind: FakeStatic) -> ir.Value:
        """The values of ``x`` on one fixed grid."""
        zero = None if kind.symmetric else self._writer.number("fake_zero_point", kind.zero_point)
        return self._on_grid(anchor, x, self._writer.number("fake_scale", kind.scale), zero, kind)

    def _on_grid(
        self, anchor: ir.Node, x: ir.Value, scale: ir.Value, zero: ir.Value | None, kind: FakeQuantized
    ) -> ir.Value:
        """The values of ``x`` on grids whose scales and zero points broadcast against it."""
        integers = self.integers(anchor, x, scale, zero, kind)
        if zero is not None:
            integers = self._writer.add(anchor, "Sub", integers, zero)
        return self._writer.add(anchor, "Mul", integers, scale)

    def integers(
        self, anchor: ir.Node, x: ir.Value, scale: ir.Value, zero: ir.Value | None, kind: FakeQuantized
    ) -> ir.Value:
        """The integers of ``x``, as float32, on grids whose scales and zero points broadcast against it."""
        add = self._writer.add
        integers = add(anchor, "Round", add(anchor, "Div", x, scale))
        if zero is not None:
            integers = add(anchor, "Add", integers, zero)
        return add(
            anchor, "Clip", integers, self._writer.number("low", kind.low), self._writer.number("high", kind.high)
        )

    def row_scales(self, anchor: ir.Node, x: ir.Value, kind: FakePerToken) -> ir.Value:
        """The scale of each row on a symmetric grid, [..., 1]."""
        highest = self._writer.reduced(anchor, "ReduceMax", self._writer.add(anchor, "Abs", x))
        return self._scale(anchor, self._clipped(anchor, highest, kind.clip_ratio), kind)

    def _asymmetric(self, anchor: ir.Node, x: ir.Value, kind: FakePerToken) -> tuple[ir.Value, ir.Value]:
        """The scale and the zero point of each row."""
        add, nothing = self._writer.add, self._writer.number("zero", 0)
        ends = []
        for reduce, bound in (("ReduceMin", "Min"), ("ReduceMax", "Max")):
            end = add(anchor, bound, self._writer.reduced(anchor, reduce, x), nothing)
            ends.append(self._clipped(anchor, end, kind.clip_ratio))
        scale = self._scale(anchor, add(anchor, "Sub", ends[1], ends[0]), kind)
        zero = add(anchor, "Round", add(anchor, "Div", add(anchor, "Neg", ends[0]), scale))
        return scale, zero

    def _scale(self, anchor: ir.Node, span: ir.Value, kind: FakePerToken) -> ir.Value:
        step = self._writer.add(anchor, "Div", span, self._writer.number("steps", kind.high))
        return self._writer.add(anchor, "Max", step, self._writer.number("tiny", TINY))

    def _clipped(self, anchor: ir.Node, value: ir.Value, clip_ratio: float) -> ir.Value:
        if clip_ratio == 1:
            return value
        return self._writer.add(anchor, "Mul", value, self._writer.number("clip_ratio", clip_ratio))
