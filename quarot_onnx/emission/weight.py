"""Weights as nodes: integers with a DequantizeLinear, MatMulNBits, or the real numbers that integers stand for.

A rounded weight is read, or computed, when the model is written.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.config.choices import OutputFormat
from quarot_onnx.config.storage import CHANNEL_BLOCK, blocked_bits
from quarot_onnx.emission import packing
from quarot_onnx.emission.formats import MAX_BLOCK, StoredWeight, power_of_two
from quarot_onnx.emission.opset import raise_opset
from quarot_onnx.emission.writer import Writer
from quarot_onnx.graph.linear import Linear


class WeightWriter:
    """Writes the weights of Linears."""

    def __init__(self, writer: Writer) -> None:
        """Write with ``writer``."""
        self._writer = writer

    def real(self, linear: Linear, given: StoredWeight, dtype: ir.DataType) -> ir.Value:
        """The real numbers of a rounded weight as an initializer of type ``dtype``."""
        kind = dtype.numpy()

        def compute() -> NDArray[np.generic]:
            return given.rounded.load().dequantized().astype(kind, copy=False)

        return self._writer.lazy(f"{_name(linear)}_rounded", compute, dtype, given.rounded.shape)

    def dequantized(self, linear: Linear, given: StoredWeight) -> ir.Value:
        """A rounded weight as integers with a DequantizeLinear, float32.

        4-bit integers pass a Cast to int8, which onnxruntime carries out once, when it loads the model: with 4-bit
        operands it finds no quantized kernel. Unsigned ones become int8 too, where the kernel is faster. In QDQ they
        stay as they are, for those who look for 4-bit Q/DQ.

        Raises:
            ConfigError: 4 bits, and the model's opset is too old for them and cannot be raised.
        """
        rounded, name = given.rounded, _name(linear)
        scheme = rounded.scheme
        assert not given.grouped, "scales per group do not go with 8-bit activations"
        signed = scheme.signed or scheme.bits < 8
        wide = ir.DataType.INT8 if signed else ir.DataType.UINT8
        narrow = wide
        if given.stored_bits == 4:
            raise_opset(self._writer.editor, "4-bit weights beside quantized activations", "the format nbits or w8")
            narrow = ir.DataType.INT4 if scheme.signed else ir.DataType.UINT4
            wide = narrow if given.format is OutputFormat.QDQ else wide
        stored = np.uint8 if narrow is ir.DataType.UINT4 else np.int8 if narrow is ir.DataType.INT4 else wide.numpy()
        # 7 bits as they are, 127 · 255 · 2, would saturate the kernel of processors without VNNI; around 0 none do.
        shift = scheme.dtype(scheme.middle if scheme.bits == 7 and not scheme.signed else 0)

        def integers() -> NDArray[np.generic]:
            return np.ascontiguousarray((rounded.load().integers - shift).astype(stored, copy=False))

        grid_shape = rounded.shape[1:] if scheme.per_channel else ()

        def scale() -> NDArray[np.generic]:
            return rounded.grid().scale.reshape(grid_shape)

        def zero() -> NDArray[np.generic]:
            return (rounded.grid().zero_point - shift).astype(wide.numpy()).reshape(grid_shape)

        value = self._writer.lazy(f"{name}_{narrow.name.lower()}", integers, narrow, rounded.shape)
        grids = (
            self._writer.lazy(f"{name}_scale", scale, ir.DataType.FLOAT, grid_shape),
            self._writer.lazy(f"{name}_zero_point", zero, wide, grid_shape),
        )
        value = self._writer.cast(linear.node, value, narrow, wide)
        attributes = {"axis": 1} if grid_shape else {}
        return self._writer.add(linear.node, "DequantizeLinear", value, *grids, **attributes)

    def blocked(self, linear: Linear, given: StoredWeight, x: ir.Value, stem: str) -> ir.Node:
        """A MatMulNBits of float32 ``x`` and a rounded weight, for the caller to insert."""
        rounded, name = given.rounded, _name(linear)
        features, outputs = rounded.shape
        block = given.block_size(default=min(CHANNEL_BLOCK, power_of_two(features)))
        assert block <= MAX_BLOCK, block
        level = given.accuracy_level
        bits = blocked_bits(rounded.scheme.bits, given.format, accuracy_level=level, block=block)
        blocks = -(-features // block)
        lazy, byte = self._writer.lazy, ir.DataType.UINT8
        operands = [
            lazy(
                f"{name}_packed",
                lambda: packing.packed_columns(rounded.load(), block, bits),
                byte,
                (outputs, blocks, block * bits // 8),
            ),
            lazy(f"{name}_scale", lambda: packing.block_scales(rounded, block), ir.DataType.FLOAT, (outputs, blocks)),
        ]
        if not rounded.scheme.symmetric:
            shape = (outputs, packing.packed_length(blocks, bits))
            operands.append(
                lazy(f"{name}_zero_point", lambda: packing.block_zero_points(rounded, block, bits), byte, shape)
            )
        attributes = {"K": features, "N": outputs, "bits": bits, "block_size": block}
        if level is not None:
            attributes["accuracy_level"] = level
        return self._writer.editor.node(
            "MatMulNBits",
            [x, *operands],
            stem,
            domain="com.microsoft",
            attributes=[ir.AttrInt64(key, value) for key, value in attributes.items()],
        )


def _name(linear: Linear) -> str:
    return linear.weight.value.name or linear.name
