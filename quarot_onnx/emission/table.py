"""Embeddings as nodes.

8 bits per row: Gather of integers, times Gather of the rows' scales, in standard operators. 4 bits, or scales per
group: com.microsoft.GatherBlockQuantized.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.config.choices import OutputFormat
from quarot_onnx.emission import packing
from quarot_onnx.emission.formats import StoredWeight, power_of_two
from quarot_onnx.emission.writer import Writer
from quarot_onnx.graph.query import Constant


class TableWriter:
    """Rewrites embedding Gathers."""

    def __init__(self, writer: Writer) -> None:
        """Write with ``writer``."""
        self._writer, self._editor = writer, writer.editor

    def write(self, node: ir.Node, table: Constant, given: StoredWeight) -> None:
        """Write a rounded table."""
        if given.format is OutputFormat.FAKE:
            self._real(node, table, given)
        elif given.stored_bits == 8 and not given.grouped:
            self._rows(node, table, given)
        else:
            self._blocked(node, table, given)

    def _real(self, node: ir.Node, table: Constant, given: StoredWeight) -> None:
        """The real numbers that the integers stand for."""
        kind = table.dtype.numpy()

        def compute() -> NDArray[np.generic]:
            return np.ascontiguousarray(given.rounded.load().dequantized().T.astype(kind, copy=False))

        real = self._writer.lazy(f"{table.value.name}_rounded", compute, table.dtype, table.shape)
        self._editor.replace_input(node, 0, real)

    def _rows(self, node: ir.Node, table: Constant, given: StoredWeight) -> None:
        """8-bit integers with a scale for each row, or for all."""
        rounded, scheme = given.rounded, given.rounded.scheme
        kind = ir.DataType.INT8 if scheme.signed else ir.DataType.UINT8
        grid_shape = (table.shape[0], 1) if scheme.per_channel else ()

        def compute() -> NDArray[np.generic]:
            return np.ascontiguousarray(rounded.load().integers.T)

        def scale() -> NDArray[np.generic]:
            return rounded.grid().scale.reshape(grid_shape)

        def zero() -> NDArray[np.generic]:
            return rounded.grid().zero_point.astype(np.float32).reshape(grid_shape)

        lazy, name, real = self._writer.lazy, table.value.name or "table", ir.DataType.FLOAT
        integers = lazy(f"{name}_{kind.name.lower()}", compute, kind, table.shape)
        scales = lazy(f"{name}_scale", scale, real, grid_shape)
        centred = scheme.symmetric and scheme.signed
        zeros = None if centred else lazy(f"{name}_zero_point", zero, real, grid_shape)
        self._gathered(node, table, integers, scales, zeros)

    def _gathered(
        self, node: ir.Node, table: Constant, integers: ir.Value, scale: ir.Value, zero_point: ir.Value | None
    ) -> None:
        """Gather of ``integers``, and what makes real numbers of them.

        Args:
            node: The Gather.
            table: Its table.
            integers: [rows, hidden], 8 bits.
            scale: float32, [rows, 1] or [].
            zero_point: The same shape, as float32; None for zeros.
        """
        edit = self._editor
        edit.replace_input(node, 0, integers)
        steps = [("Mul", "Scale", scale)]
        if zero_point is not None:
            steps.insert(0, ("Sub", "ZeroPoint", zero_point))
        by_row = bool(scale.shape)

        def build(value: ir.Value) -> list[ir.Node]:
            nodes = [self._writer.cast_node(value, ir.DataType.FLOAT, f"{node.name}/Cast")]
            for op_type, stem, grid in steps:
                real, operand = nodes[-1].outputs[0], grid
                if by_row:
                    nodes.append(edit.node("Gather", [grid, node.inputs[1]], f"{node.name}/{stem}s"))
                    operand = nodes[-1].outputs[0]
                nodes.append(edit.node(op_type, [real, operand], f"{node.name}/{stem}"))
            if table.dtype is not ir.DataType.FLOAT:
                nodes.append(self._writer.cast_node(nodes[-1].outputs[0], table.dtype, f"{node.name}/Back"))
            return nodes

        edit.redirect(node.outputs[0], build)
        node.outputs[0].type = integers.type

    def _blocked(self, node: ir.Node, table: Constant, given: StoredWeight) -> None:
        """Packed integers with scales per block of a row."""
        edit, name, byte = self._editor, table.value.name or "table", ir.DataType.UINT8
        load, (rows, hidden) = given.rounded.load, table.shape
        # onnxruntime takes rows of whole bytes only.
        bits = given.stored_bits if hidden % 2 == 0 else 8
        block = given.block_size(default=power_of_two(hidden))
        blocks = -(-hidden // block)
        zeros = (rows, packing.packed_length(blocks, bits))
        parts: list[tuple[str, Callable[[], NDArray[Any]], ir.DataType, tuple[int, ...]]] = [
            ("packed", lambda: packing.packed_rows(load(), bits), byte, (rows, packing.packed_length(hidden, bits))),
            ("scale", lambda: packing.block_scales(given.rounded, block), ir.DataType.FLOAT, (rows, blocks)),
            ("zero_point", lambda: packing.block_zero_points(given.rounded, block, bits), byte, zeros),
        ]
        data, *grids = (
            self._writer.lazy(f"{name}_{what}", call, dtype, shape)
            for what, call, dtype, shape in parts[: 2 if given.rounded.scheme.symmetric else 3]
        )
        attributes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        made = edit.node(
            "GatherBlockQuantized",
            [data, node.inputs[1], *grids],
            f"{node.name or 'embedding'}/quantized",
            domain="com.microsoft",
            attributes=[ir.AttrInt64(key, value) for key, value in attributes.items()],
        )
        made.metadata_props.update(node.metadata_props)
        nodes = [made]
        if table.dtype is not ir.DataType.FLOAT:
            nodes.append(self._writer.cast_node(made.outputs[0], table.dtype, f"{made.name}/Back"))
        nodes[-1].outputs[0].type, nodes[-1].outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        edit.replace_node(node, nodes)
