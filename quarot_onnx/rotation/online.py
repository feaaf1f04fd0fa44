"""Online rotations in standard operators: y = c·x R as Reshape, MatMul pairs, Reshape.

With X = reshape(x, [-1, m, k]) and factors F₁: [m, m], F₂: [k, k] acting on their axes,

    y = x (F₁ ⊗ F₂)    is    Y = F₁ᵀ X F₂

so the left operand is F₁ *transposed* (Paley matrices are not symmetric). Further factors are mixed
from the left, one axis at a time, before the last two. One initializer per factor serves all layers.
"""

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.graph.edit import Editor
from quarot_onnx.graph.tags import is_online, mark_online
from quarot_onnx.hadamard.online import OnlineFactors
from quarot_onnx.io.marks import FACTOR

__all__ = ["OnlineWriter", "is_online"]


class OnlineWriter:
    """Writes online rotations into one graph; equal factors are shared."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._constants: dict[tuple[bytes, tuple[int, ...], ir.DataType], ir.Value] = {}
        self._shapes: dict[tuple[int, ...], ir.Value] = {}

    def build(self, x: ir.Value, factors: OnlineFactors, dtype: ir.DataType, stem: str) -> list[ir.Node]:
        """The nodes that rotate the last axis of ``x``.

        Args:
            x: [..., n]; n is ``factors.size`` or, for heads packed side by side, a multiple of it.
            factors: What to multiply with.
            dtype: The type of ``x``.
            stem: Names of the nodes start with it.

        Returns:
            The nodes in order; the last one's output has the shape of ``x``.
        """
        edit = self._editor
        shape = edit.node("Shape", [x], f"{stem}/Shape")
        nodes, remaining = [shape], list(factors.factors)
        while len(remaining) > 2:
            first = remaining.pop(0)
            width = math.prod(len(f) for f in remaining)
            nodes.append(self._reshape(nodes, x, (-1, len(first), width), stem))
            nodes.append(edit.node("MatMul", [self._constant(first.T, dtype), nodes[-1].outputs[0]], f"{stem}/MatMul"))
        nodes.append(self._reshape(nodes, x, (-1, *(len(f) for f in remaining)), stem))
        right = self._constant(remaining.pop(), dtype)
        nodes.append(edit.node("MatMul", [nodes[-1].outputs[0], right], f"{stem}/MatMul"))
        if remaining:
            left = self._constant(remaining.pop().T, dtype)
            nodes.append(edit.node("MatMul", [left, nodes[-1].outputs[0]], f"{stem}/MatMul"))
        nodes.append(edit.node("Reshape", [nodes[-1].outputs[0], shape.outputs[0]], f"{stem}/Restore"))
        return _tagged(nodes)

    def build_plain(self, x: ir.Value, matrix: NDArray[np.float64], dtype: ir.DataType, stem: str) -> list[ir.Node]:
        """One MatMul with a whole matrix: for an axis that is exactly the rotation's."""
        return _tagged([self._editor.node("MatMul", [x, self._constant(matrix, dtype)], f"{stem}/MatMul")])

    def build_heads(
        self,
        x: ir.Value,
        matrices: NDArray[np.float64],
        dtype: ir.DataType,
        stem: str,
        *,
        packed: bool,
        centres: NDArray[np.float64] | None = None,
    ) -> list[ir.Node]:
        """The nodes that multiply every head by a matrix of its own: x A, or (x − c) A.

        Args:
            x: [batch, heads, seq, head_dim]; ``packed``: [batch, seq, heads · head_dim].
            matrices: [heads, head_dim, head_dim].
            dtype: The type of ``x``.
            stem: Names of the nodes start with it.
            packed: Whether heads lie side by side.
            centres: c, [heads, head_dim]; taken off behind the product, as c A.

        Returns:
            The nodes in order; the last one's output has the shape of ``x``.
        """
        edit, (heads, head_dim) = self._editor, matrices.shape[:2]
        nodes: list[ir.Node] = []

        def add(op: str, *inputs: ir.Value, name: str = "", attributes: Sequence[ir.Attr] = ()) -> ir.Value:
            nodes.append(edit.node(op, inputs, f"{stem}/{name or op}", attributes=attributes))
            return nodes[-1].outputs[0]

        perm = [ir.AttrInt64s("perm", [0, 2, 1, 3])]
        if packed:
            x = add("Reshape", x, self._shape((0, 0, heads, head_dim)))
            x = add("Transpose", x, attributes=perm)
        x = add("MatMul", x, self._constant(matrices, dtype))
        if centres is not None:
            x = add("Sub", x, self._constant(centres[:, None] @ matrices, dtype))
        if packed:
            x = add("Transpose", x, attributes=perm)
            add("Reshape", x, self._shape((0, 0, heads * head_dim)), name="Restore")
        return _tagged(nodes)

    def _reshape(self, nodes: list[ir.Node], x: ir.Value, target: tuple[int, ...], stem: str) -> ir.Node:
        """A Reshape of what the last node made, or of ``x`` when only its Shape was taken yet."""
        value = x if len(nodes) == 1 else nodes[-1].outputs[0]
        return self._editor.node("Reshape", [value, self._shape(target)], f"{stem}/Reshape")

    def _constant(self, matrix: NDArray[np.float64], dtype: ir.DataType) -> ir.Value:
        array = np.ascontiguousarray(matrix).astype(dtype.numpy())
        key = (array.tobytes(), array.shape, dtype)
        if key not in self._constants:
            name = f"{FACTOR}{array.shape[0]}"
            self._constants[key] = self._editor.initializer(name, ir.Tensor(array, dtype=dtype))
        return self._constants[key]

    def _shape(self, target: tuple[int, ...]) -> ir.Value:
        if target not in self._shapes:
            tensor = ir.Tensor(np.array(target, dtype=np.int64))
            self._shapes[target] = self._editor.initializer("quarot/shape_" + "x".join(map(str, target)), tensor)
        return self._shapes[target]


def _tagged(nodes: list[ir.Node]) -> list[ir.Node]:
    for node in nodes:
        mark_online(node)
    return nodes
