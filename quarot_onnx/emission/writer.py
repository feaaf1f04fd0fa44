"""Inserting nodes before an anchor, sharing small constants."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.graph.edit import Editor
from quarot_onnx.io import model_io


class Writer:
    """Adds to one graph."""

    def __init__(self, model: ir.Model) -> None:
        """Take stock of the graph."""
        self.model = model
        self.editor = Editor(model)
        self._constants: dict[tuple[str, bytes], ir.Value] = {}

    @property
    def opset(self) -> int:
        """The version of the standard operators."""
        return self.model.graph.opset_imports.get("", 1)

    def constant(self, stem: str, array: NDArray[np.generic]) -> ir.Value:
        """A small initializer, shared by equal content."""
        key = (f"{stem}{array.dtype}{array.shape}", array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.editor.initializer(f"quarot/{stem}", ir.Tensor(array))
        return self._constants[key]

    def number(self, stem: str, value: float | np.float32) -> ir.Value:
        """A float32 number."""
        return self.constant(stem, np.array(value, np.float32))

    def ints(self, *values: int) -> ir.Value:
        """A vector of int64 numbers, such as axes and ends."""
        return self.constant("numbers", np.array(values, np.int64))

    def lazy(
        self, stem: str, compute: Callable[[], NDArray[Any]], dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.Value:
        """An initializer whose array is computed when the model is written."""
        return self.editor.initializer(stem, model_io.lazy_tensor(compute, dtype=dtype, shape=shape, name=stem))

    def add(self, anchor: ir.Node, op_type: str, *inputs: ir.Value, **attributes: int | list[int] | str) -> ir.Value:
        """Insert a node before ``anchor`` and return its output."""
        attrs = [_attribute(key, value) for key, value in attributes.items()]
        made = self.editor.node(op_type, inputs, f"{anchor.name or 'node'}/{op_type}", attributes=attrs)
        self.editor.before(anchor, [made])
        return made.outputs[0]

    def reduced(self, anchor: ir.Node, op_type: str, x: ir.Value) -> ir.Value:
        """ReduceMin or ReduceMax over the last axis, which stays."""
        if self.opset < 18:
            return self.add(anchor, op_type, x, axes=[-1], keepdims=1)
        axes = self.constant("last_axis", np.array([-1], dtype=np.int64))
        return self.add(anchor, op_type, x, axes, keepdims=1)

    def summed(self, anchor: ir.Node, x: ir.Value, axis: int) -> ir.Value:
        """ReduceSum over an axis, which goes."""
        if self.opset < 13:
            return self.add(anchor, "ReduceSum", x, axes=[axis], keepdims=0)
        axes = self.constant("axis", np.array([axis], dtype=np.int64))
        return self.add(anchor, "ReduceSum", x, axes, keepdims=0)

    def cast(self, anchor: ir.Node, value: ir.Value, have: ir.DataType, want: ir.DataType) -> ir.Value:
        """``value`` in another type, through a Cast where they differ."""
        return value if have is want else self.add(anchor, "Cast", value, to=int(want))

    def cast_node(self, value: ir.Value, to: ir.DataType, stem: str) -> ir.Node:
        """A Cast that the caller inserts."""
        return self.editor.node("Cast", [value], stem, attributes=[ir.AttrInt64("to", int(to))])


def _attribute(key: str, value: int | list[int] | str) -> ir.Attr:
    match value:
        case str():
            return ir.AttrString(key, value)
        case list():
            return ir.AttrInt64s(key, value)
        case _:
            return ir.AttrInt64(key, value)
