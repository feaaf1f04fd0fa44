"""Nodes that the prefix adds to a graph: each next to the one that needs it, constants and the batch size once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.graph.edit import Editor
from quarot_onnx.graph.query import consumers
from quarot_onnx.graph.tags import PREFIX

_END = np.iinfo(np.int64).max


class Graft:
    """Writes into one graph.

    Attributes:
        editor: The graph's editor.
        length: Tokens of the prefix.
    """

    def __init__(self, editor: Editor, tokens: ir.Value, length: int) -> None:
        """Take the batch size from ``tokens`` [batch, sequence]."""
        self.editor, self.length, self._tokens = editor, length, tokens
        self._ints: dict[tuple[int, ...], ir.Value] = {}
        self._batch: dict[int, ir.Value] = {}
        self._widened: dict[tuple[ir.Value, float], ir.Value] = {}
        self._shifted: dict[ir.Value, ir.Value] = {}
        self._pads: dict[tuple[int, ir.DataType], ir.Value] = {}

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], anchor: ir.Node, **attributes: int) -> ir.Value:
        """The output of a node before ``anchor``."""
        node = self._node(op_type, inputs, **attributes)
        self.editor.before(anchor, [node])
        return node.outputs[0]

    def ints(self, *values: int) -> ir.Value:
        """A constant int64 vector."""
        if values not in self._ints:
            self._ints[values] = self.constant("ints", np.array(values, np.int64))
        return self._ints[values]

    def constant(self, name: str, array: NDArray[Any], dtype: ir.DataType | None = None) -> ir.Value:
        """A constant tensor, of another type where one is named."""
        tensor = ir.Tensor(array) if dtype is None else ir.Tensor(array.astype(dtype.numpy()), dtype=dtype)
        return self.editor.initializer(f"{PREFIX}/{name}", tensor)

    def per_row(self, name: str, array: NDArray[Any], dtype: ir.DataType, anchor: ir.Node) -> ir.Value:
        """A constant [1, ...] repeated along the batch."""
        shape = self._batch.get(array.ndim)
        if shape is None:
            first = self.editor.graph[0]
            whole = self.op("Shape", [self._tokens], first)
            rows = self.op("Slice", [whole, self.ints(0), self.ints(1)], first)
            ones = self.ints(*[1] * (array.ndim - 1))
            shape = self._batch[array.ndim] = self.op("Concat", [rows, ones], first, axis=0)
        return self.op("Expand", [self.constant(name, array, dtype), shape], anchor)

    def joined(self, first: ir.Value, second: ir.Value, axis: int, anchor: ir.Node) -> ir.Value:
        """Two values along an axis."""
        return self.op("Concat", [first, second], anchor, axis=axis)

    def first(self, count: ir.Value, value: ir.Value, axis: int, anchor: ir.Node) -> ir.Value:
        """The first ``count`` entries of an axis, or as many as there are."""
        return self.op("Slice", [value, self.ints(0), count, self.ints(axis)], anchor)

    def cut_off(self, value: ir.Value, axis: int, count: ir.Value) -> None:
        """Let all users of a value see it without the first ``count`` entries of an axis."""

        def build(whole: ir.Value) -> list[ir.Node]:
            inputs = [whole, count, self.ints(_END), self.ints(axis)]
            return [self._node("Slice", inputs)]

        stated = value.shape
        self.editor.redirect(value, build)
        seen = next(node.outputs[0] for node, _ in consumers(value) if node.op_type == "Slice")
        seen.shape, seen.type = stated, value.type
        forget_shape(value)

    def widened(self, mask: ir.Value, filling: float, dtype: ir.DataType) -> ir.Value:
        """A mask [..., keys] with a column for each token of the prefix in front; the same for all who share it."""
        key = (mask, filling)
        if key not in self._widened:
            shape = self._node("Shape", [mask])
            rows = self._node("Slice", [shape.outputs[0], self.ints(0), self.ints(-1)])
            wanted = self._node("Concat", [rows.outputs[0], self.ints(self.length)], axis=0)
            column = self.constant("column", np.array([filling]), dtype)
            columns = self._node("Expand", [column, wanted.outputs[0]])
            joined = self._node("Concat", [columns.outputs[0], mask], axis=-1)
            self.editor.after_value(mask, [shape, rows, wanted, columns, joined])
            self._widened[key] = joined.outputs[0]
        return self._widened[key]

    def added(self, value: ir.Value, dtype: ir.DataType, pads: ir.Value | None = None) -> ir.Value:
        """A length, or a position without pads, increased by the prefix; the same for all who share it."""
        if value not in self._shifted:
            nodes, current = [], value
            if pads is not None:
                nodes.append(self._node("Sub", [value, pads]))
                nodes.append(self._node("Max", [nodes[0].outputs[0], self.constant("start", np.array(0), dtype)]))
                current = nodes[1].outputs[0]
            nodes.append(self._node("Add", [current, self.constant("length", np.array(self.length), dtype)]))
            self.editor.after_value(value, nodes)
            self._shifted[value] = nodes[-1].outputs[0]
        return self._shifted[value]

    def pads(self, mask: ir.Value, rank: int, dtype: ir.DataType) -> ir.Value:
        """How many columns a mask [batch, columns] hides at the left of each row, [batch, 1, ...] of ``rank`` axes."""
        key = (rank, dtype)
        if key not in self._pads:
            first = self.editor.graph[0]
            shown = self.op("Cast", [mask], first, to=ir.DataType.FLOAT)
            hidden = self.op("ArgMax", [shown], first, axis=1, keepdims=1)
            counts = self.op("Reshape", [hidden, self.ints(-1, *[1] * (rank - 1))], first)
            self._pads[key] = self.op("Cast", [counts], first, to=dtype)
        return self._pads[key]

    def _node(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: int) -> ir.Node:
        made = [ir.AttrInt64(name, value) for name, value in attributes.items()]
        return self.editor.node(op_type, inputs, f"{PREFIX}/{op_type}", attributes=made)


def forget_shape(value: ir.Value) -> None:
    """Drop what an exporter has written of a shape that is another one now: onnxruntime plans its memory by it."""
    value.shape = None


def has(node: ir.Node, index: int) -> bool:
    """Whether an optional input is there."""
    return index < len(node.inputs) and node.inputs[index] is not None


def set_input(node: ir.Node, index: int, value: ir.Value) -> None:
    """Give a node an input, also one past those that it has."""
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
