"""Fused attentions: the prefix is the past that stands before the caller's.

::

    past' = Concat(prefix, past)     present = present'[prefix:]     lengths' = lengths + prefix

GroupQueryAttention takes a batch of several rows only where it sees a first prompt, that is where all keys are new. So
there the prefix is fed as new tokens before the caller's, and its context is cut off again. A past that is empty stays
so; before a buffer that the caller keeps at one length, of which a first prompt reads nothing, the prefix takes its
room all the same, so that the present has the length that the caller knows. That length may be fixed once the prefix is
in the graph, not before: the present of the prefix's own run is to hold the prefix alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.errors import ModelError
from quarot_onnx.graph.caches import FUSED_CACHES
from quarot_onnx.graph.query import attribute_int, data_input, label
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.prefix.graft import Graft, has, set_input
from quarot_onnx.rotation.rope import POSITIONS, SEQLENS, TOTAL
from quarot_onnx.sites.attention import K_SCALE
from quarot_onnx.sites.model import Attention

Seen = Mapping[str, NDArray[Any]]

_BIAS = 10
"""An input of GroupQueryAttention."""


def _pasts(node: ir.Node) -> tuple[int, ...]:
    """The inputs of K's and V's past."""
    return tuple(FUSED_CACHES[node.domain, node.op_type])


def _presents(node: ir.Node) -> list[ir.Value]:
    """The outputs that carry them on."""
    return [node.outputs[index] for index in FUSED_CACHES[node.domain, node.op_type].values()]


@dataclass(frozen=True, eq=False)
class GroupQueryPlace:
    """A GroupQueryAttention; ``parts`` are the inputs that hold what is new: Q, K and V, or all in one."""

    node: ir.Node
    parts: tuple[int, ...]
    dtype: ir.DataType

    @property
    def wanted(self) -> tuple[ir.Value, ...]:
        """What the prefix's own run must give."""
        return (*(data_input(self.node, index) for index in self.parts), *_presents(self.node))

    def attach(self, graft: Graft, seen: Seen) -> None:
        """Put the prefix in."""
        node = self.node
        presents = _presents(node)
        fresh = self._fresh(graft)
        length = graft.ints(graft.length)
        for index in self.parts:
            value = data_input(node, index)
            own = graft.per_row("fed", seen[value.name or ""][:1], self.dtype, node)
            own = graft.first(fresh, own, 1, node)
            node.replace_input_with(index, graft.joined(own, value, 1, node))
        for index, present in zip(_pasts(node), presents, strict=True):
            own = graft.per_row("cache", seen[present.name or ""][:1], self.dtype, node)
            past = data_input(node, index)
            own = graft.first(self._room(graft, past), own, 2, node)
            node.replace_input_with(index, graft.joined(own, past, 2, node))
        for index in (SEQLENS, TOTAL):
            node.replace_input_with(index, graft.added(data_input(node, index), ir.DataType.INT32))
        if has(node, POSITIONS):
            given = data_input(node, POSITIONS)
            own = graft.per_row("positions", np.arange(graft.length)[None], ir.DataType.INT64, node)
            later = graft.added(given, ir.DataType.INT64)
            node.replace_input_with(POSITIONS, graft.joined(graft.first(fresh, own, 1, node), later, 1, node))
        if has(node, _BIAS):
            pads = graft.op("Concat", [graft.ints(0, 0), fresh, length, graft.ints(0, 0, 0, 0)], node, axis=0)
            node.replace_input_with(_BIAS, graft.op("Pad", [data_input(node, _BIAS), pads], node))
        graft.cut_off(node.outputs[0], 1, fresh)
        for present in presents:
            graft.cut_off(present, 2, length)

    def _room(self, graft: Graft, past: ir.Value) -> ir.Value:
        """How many tokens of the prefix stand before a past, [1]: none before an empty one, else as many or more."""
        shape = graft.op("Shape", [past], self.node)
        held = graft.op("Slice", [shape, graft.ints(2), graft.ints(3)], self.node)
        return graft.op("Mul", [held, graft.ints(graft.length)], self.node)

    def _fresh(self, graft: Graft) -> ir.Value:
        """How many tokens of the prefix are fed as new ones, [1]: all at a first prompt, else none."""
        node = self.node
        whole = graft.op("Shape", [data_input(node, 0)], node)
        fed = graft.op("Slice", [whole, graft.ints(1), graft.ints(2)], node)
        total = graft.op("Cast", [data_input(node, TOTAL)], node, to=ir.DataType.INT64)
        total = graft.op("Reshape", [total, graft.ints(1)], node)
        first = graft.op("Cast", [graft.op("Equal", [fed, total], node)], node, to=ir.DataType.INT64)
        return graft.op("Mul", [first, graft.ints(graft.length)], node)


@dataclass(frozen=True)
class _Operator:
    """Inputs of a fused operator: what is added to the scores, and what hides keys."""

    mask: int
    padding: int | None = None


_OPERATORS = {
    ("", "Attention"): _Operator(3),
    ("com.microsoft", "MultiHeadAttention"): _Operator(5, padding=4),
}


@dataclass(frozen=True, eq=False)
class FusedPlace:
    """An Attention or a MultiHeadAttention; ``masks`` are inputs with a column for each key, and their types."""

    attention: Attention
    masks: tuple[tuple[int, float, ir.DataType], ...]
    dtype: ir.DataType

    @property
    def _cached(self) -> bool:
        """Whether the operator has a past of its own."""
        return has(self.attention.node, _pasts(self.attention.node)[0])

    @property
    def wanted(self) -> tuple[ir.Value, ...]:
        """What the prefix's own run must give: the presents, or K and V themselves."""
        node = self.attention.node
        return tuple(_presents(node)) if self._cached else (data_input(node, 1), data_input(node, 2))

    def attach(self, graft: Graft, seen: Seen) -> None:
        """Put the prefix in."""
        node, cached = self.attention.node, self._cached
        arrays = [self._heads(seen[value.name or ""][:1]) for value in self.wanted]
        for index, array in zip(_pasts(node), arrays, strict=True):
            own = graft.per_row("cache", array, self.dtype, node)
            set_input(node, index, graft.joined(own, data_input(node, index), 2, node) if cached else own)
        for index, filling, dtype in self.masks:
            node.replace_input_with(index, graft.widened(data_input(node, index), filling, dtype))
        if cached:
            for present in _presents(node):
                graft.cut_off(present, 2, graft.ints(graft.length))
            return
        # onnxruntime reads a past only where the present is asked for.
        node.resize_outputs(max(len(node.outputs), 3))
        for number, present in enumerate(_presents(node), 1):
            present.name = graft.editor.unique(f"{node.name}/present_{number}")

    def _heads(self, array: NDArray[Any]) -> NDArray[Any]:
        """K or V as a past, [1, heads, keys, head_dim]."""
        if array.ndim == 4:
            return array
        return np.ascontiguousarray(array.reshape(1, array.shape[1], -1, self.attention.head_dim).swapaxes(1, 2))


def fused_place(attention: Attention, shapes: Shapes) -> GroupQueryPlace | FusedPlace:
    """The place of a fused attention.

    Raises:
        ModelError: It takes or keeps its keys in a way that has no room for a prefix.
    """
    node = attention.node
    dtype = shapes.dtype(node.outputs[0]) or shapes.dtype(data_input(node))
    if dtype is None:
        raise ModelError(f"{label(node)}: the type of its output is not known")
    if node.op_type == "GroupQueryAttention":
        return _group_query(node, dtype)
    operator = _OPERATORS[node.domain, node.op_type]
    cached = [has(node, index) for index in _pasts(node)]
    if cached[0] != cached[1] or not has(node, 1) or not has(node, 2) or (node.domain and has(node, 3)):
        raise ModelError(f"{label(node)} ({node.op_type}) packs Q, K and V, or adds biases to them")
    masks = []
    if has(node, operator.mask):
        mask = data_input(node, operator.mask)
        mask_dtype = shapes.dtype(mask) or dtype
        masks.append((operator.mask, float(mask_dtype is ir.DataType.BOOL), mask_dtype))
    if operator.padding is not None and has(node, operator.padding):
        if shapes.rank(data_input(node, operator.padding)) != 2:
            raise ModelError(f"{label(node)}: its key_padding_mask is no matrix [batch, keys]")
        masks.append((operator.padding, 1.0, ir.DataType.INT32))
    return FusedPlace(attention, tuple(masks), dtype)


def _group_query(node: ir.Node, dtype: ir.DataType) -> GroupQueryPlace:
    if has(node, K_SCALE) or attribute_int(node, "kv_cache_bit_width", 0):
        raise ModelError(f"{label(node)} quantizes its cache")
    if not all(has(node, index) for index in _pasts(node)) or len(node.outputs) < 3:
        raise ModelError(f"{label(node)} has no cache")
    parts = (0, 1, 2) if has(node, 1) else (0,)
    return GroupQueryPlace(node, parts, dtype)
