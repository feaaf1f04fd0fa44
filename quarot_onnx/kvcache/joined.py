"""Integer caches of attentions that are spelt out: the Concat joins integers, the attention reads them times scales.

::

    new ── / s ── round ── int ──┐
    past ────────────────────────┴── Concat ──┬── · s ── attention
                                              └── present

s is fixed, or found for every token and head and then kept in a cache of its own:

    8 bits    s = max|x| · clip / 127            a head's, float32 [batch, heads, positions, 1]
    4 bits    s = -x_f · clip / 2^(b-1),         one of each half of a head, float16 [batch, heads, positions, 2]
              x_f the entry farthest from 0, sign and all

so that x_f becomes the lowest integer, which a grid for -7 to 7 would leave unused: steps are an eighth shorter
(llama.cpp's Q4_0 does so with weights). An entry of the first half of a head and one of the second share a byte, with 4
bits each, or with 5 and 3 (`Halves`). What is new is read rounded, too: a prefill computes what decoding it would.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quarot_onnx.config.kv_cache import CacheGrid
from quarot_onnx.emission.activation import ActivationWriter
from quarot_onnx.emission.writer import Writer
from quarot_onnx.graph.query import consumers, data_input
from quarot_onnx.kvcache.integers import Floats, Halves
from quarot_onnx.kvcache.places import JoinedPlace, retype
from quarot_onnx.quantization.activations import TINY, FakePerToken

_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, eq=False)
class _Kept:
    """What a cache keeps of what is new.

    Attributes:
        integers: As whole numbers in float32, [batch, heads, seq, bytes of a head].
        scales: [batch, heads, seq, scales of a head]; None for fixed ones.
    """

    integers: ir.Value
    scales: ir.Value | None


class JoinedCache:
    """Rewrites caches of one graph."""

    def __init__(self, model: ir.Model) -> None:
        """Write into ``model``."""
        self._graph, self._writer = model.graph, Writer(model)
        self._activations = ActivationWriter(self._writer)

    def write(self, place: JoinedPlace, grid: CacheGrid, scales: Floats | None, halves: Halves) -> None:
        """Make one cache integers.

        Args:
            place: Where it is; its head_dim is even for 4 bits.
            grid: Symmetric, of 8 or 4 bits; fixed scales have its clip ratio already.
            scales: Fixed ones, broadcast against [1, heads, 1, head_dim]; None for those of tokens.
            halves: How two entries of 4 bits share a byte.
        """
        node, dtype, head_dim = place.concat, place.past.dtype, place.attention.head_dim
        assert dtype is not None, "a cache has a type"
        x = self._activations.as_float(node, data_input(node, 1), dtype)
        way: _Bytes | _TwoInAByte
        if grid.bits == 8:
            kind, width, way = ir.DataType.INT8, head_dim, _Bytes(self._writer, self._activations, node, grid, scales)
        else:
            way = _TwoInAByte(self._writer, place, halves, grid, scales)
            kind, width = ir.DataType.UINT8, head_dim // 2
        kept = way.kept(x)
        retype(place.past, kind, width)
        new = self._writer.add(node, "Cast", kept.integers, to=int(kind))
        joined = self._writer.add(node, "Concat", place.past, new, axis=2)
        every = None if kept.scales is None else self._joined_scales(place, kept.scales, way.scales_type, way.scales)
        real = way.values(joined, every)
        self._take_over(place, joined, self._writer.cast(node, real, ir.DataType.FLOAT, dtype))
        retype(joined, kind, width)

    def _joined_scales(self, place: JoinedPlace, own: ir.Value, dtype: ir.DataType, count: int) -> ir.Value:
        """The scales of all positions: those that came in, and those of what is new."""
        editor, kind = self._writer.editor, ir.TensorType(dtype)
        assert place.past.shape is not None, "looked at before"
        rows = ir.Shape([*place.past.shape[:3], count])
        past = ir.Value(name=editor.unique(f"{place.past.name}_scale"), shape=rows, type=kind)
        self._graph.inputs.append(past)
        joined = self._writer.add(place.concat, "Concat", past, own, axis=2)
        joined.name, joined.type = editor.unique(f"{place.present.name}_scale"), kind
        joined.shape = ir.Shape([*(place.present.shape or rows)[:3], count])
        self._graph.outputs.append(joined)
        return joined

    def _take_over(self, place: JoinedPlace, joined: ir.Value, real: ir.Value) -> None:
        """Put the integers out under the name of the present; whoever read that, reads real numbers."""
        old, graph = place.present, self._graph
        for user, index in consumers(old):
            user.replace_input_with(index, real)
        joined.name, old.name = old.name, self._writer.editor.unique(f"{old.name}_float")
        joined.shape = old.shape
        for position, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[position] = joined
        graph.remove(place.concat, safe=True)


class _Bytes:
    """8 bits: an entry is a byte."""

    scales, scales_type = 1, ir.DataType.FLOAT

    def __init__(
        self, writer: Writer, activations: ActivationWriter, node: ir.Node, grid: CacheGrid, fixed: Floats | None
    ) -> None:
        """Write before ``node``."""
        self._writer, self._activations, self._node = writer, activations, node
        self._rounding = FakePerToken(8, clip_ratio=grid.clip_ratio)
        self._fixed = None if fixed is None else writer.constant("cache_scale", fixed)

    def kept(self, x: ir.Value) -> _Kept:
        """What is kept of ``x``."""
        own = None if self._fixed is not None else self._activations.row_scales(self._node, x, self._rounding)
        scale = self._fixed or own
        assert scale is not None, "one of the two"
        return _Kept(self._activations.integers(self._node, x, scale, None, self._rounding), own)

    def values(self, kept: ir.Value, scales: ir.Value | None) -> ir.Value:
        """What it stands for."""
        scale = self._fixed or scales
        assert scale is not None, "one of the two"
        return self._writer.add(
            self._node, "Mul", self._writer.add(self._node, "Cast", kept, to=int(ir.DataType.FLOAT)), scale
        )


class _TwoInAByte:
    """4 bits on average: [..., head_dim] is seen as [..., 2, head_dim / 2]."""

    scales, scales_type = 2, ir.DataType.FLOAT16

    def __init__(
        self, writer: Writer, place: JoinedPlace, halves: Halves, grid: CacheGrid, fixed: Floats | None
    ) -> None:
        """Write before the Concat of ``place``."""
        self._writer, self._node, self._head_dim = writer, place.concat, place.attention.head_dim
        self._halves, self._clip = halves, grid.clip_ratio
        self._fixed = None
        if fixed is not None:
            apart = fixed.reshape(*fixed.shape[:3], *((2, -1) if fixed.shape[3] > 1 else (1, 1)))
            self._fixed = writer.constant("cache_scale", apart)

    def kept(self, x: ir.Value) -> _Kept:
        """What is kept of ``x``: scales, and integers, each plus what makes it positive, in one whole number."""
        add, halves = self._writer.add, self._halves
        rows, own = self._shaped(x, 2, self._head_dim // 2), None
        scale = self._fixed
        if scale is None:
            kept = self._scales(rows)
            own, scale = self._shaped(kept, 2), self._float(kept)
        rounded = add(self._node, "Round", add(self._node, "Div", rows, scale))
        low, high = self._each("lowest", halves.lowest), self._each("highest", -1.0 - halves.lowest)
        integers = add(self._node, "Min", add(self._node, "Max", rounded, low), high)
        places = np.array([1, 1 << halves.first], np.float32)
        together = self._writer.summed(
            self._node, add(self._node, "Mul", integers, self._each("places", places)), axis=3
        )
        middle = self._writer.number("middle", float(-(halves.lowest * places).sum()))
        return _Kept(add(self._node, "Add", together, middle), own)

    def values(self, kept: ir.Value, scales: ir.Value | None) -> ir.Value:
        """What it stands for."""
        add, halves = self._writer.add, self._halves
        first, second = (
            self._writer.constant("bits", np.array(bits, np.uint8)) for bits in (halves.first, halves.second)
        )
        low = add(
            self._node,
            "BitShift",
            add(self._node, "BitShift", kept, second, direction="LEFT"),
            second,
            direction="RIGHT",
        )
        high = add(self._node, "BitShift", kept, first, direction="RIGHT")
        both = add(self._node, "Cast", add(self._node, "Concat", low, high, axis=-1), to=int(ir.DataType.FLOAT))
        integers = add(
            self._node, "Add", self._shaped(both, 2, self._head_dim // 2), self._each("lowest", halves.lowest)
        )
        scale = self._fixed
        if scale is None:
            assert scales is not None, "kept beside them"
            scale = self._float(self._shaped(scales, 2, 1))
        return self._shaped(add(self._node, "Mul", integers, scale), self._head_dim)

    def _scales(self, rows: ir.Value) -> ir.Value:
        """The scale of each row under which its entry farthest from 0 is the lowest integer, float16 [..., 2, 1]."""
        add, number = self._writer.add, self._writer.number
        highest, lowest = (self._writer.reduced(self._node, op, rows) for op in ("ReduceMax", "ReduceMin"))
        farther = add(self._node, "Greater", highest, add(self._node, "Neg", lowest))
        farthest = add(self._node, "Where", farther, highest, lowest)
        scales = add(self._node, "Mul", farthest, self._each("parts", self._clip / self._halves.lowest))
        limited = add(self._node, "Clip", scales, number("least", -_LARGEST), number("largest", _LARGEST))
        return add(self._node, "Cast", limited, to=int(ir.DataType.FLOAT16))

    def _float(self, scales: ir.Value) -> ir.Value:
        """Scales as they are divided and multiplied by: those of zeros are none."""
        exact = self._writer.add(self._node, "Cast", scales, to=int(ir.DataType.FLOAT))
        return self._writer.add(self._node, "Add", exact, self._writer.number("tiny", TINY))

    def _each(self, stem: str, values: Floats) -> ir.Value:
        """A number for each half."""
        return self._writer.constant(stem, values.astype(np.float32).reshape(2, 1))

    def _shaped(self, x: ir.Value, *shape: int) -> ir.Value:
        """[batch, heads, positions, *shape]."""
        return self._writer.add(
            self._node, "Reshape", x, self._writer.constant("halves", np.array([0, 0, 0, *shape], np.int64))
        )
