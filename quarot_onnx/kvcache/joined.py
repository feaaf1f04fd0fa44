"""Integer caches of attentions that are spelt out: the Concat joins integers, the attention reads them times scales.

::

    new ── bytes (codec) ──┐
    past ──────────────────┴── Concat ──┬── values (codec) ── attention
                                        └── present

Scales of tokens are kept in caches of their own: of 8 bits one of each head, float32 [batch, heads, positions, 1]; of
4 bits one of each half of a head, float16 [batch, heads, positions, 2]. What is new is read rounded, too: a prefill
computes what decoding it would.
"""

import onnx_ir as ir

from quarot_onnx.config.kv_cache import CacheGrid
from quarot_onnx.emission.activation import ActivationWriter
from quarot_onnx.emission.writer import Writer
from quarot_onnx.graph.query import consumers, data_input
from quarot_onnx.kvcache.codec import Codec, EightBits, FourBits, HeadGrid, InFloat16
from quarot_onnx.kvcache.integers import Floats, Halves
from quarot_onnx.kvcache.places import JoinedPlace, retype


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
        way: Codec
        if grid.bits == 8:
            kind, width, count, scale_type = ir.DataType.INT8, head_dim, 1, ir.DataType.FLOAT
            way = EightBits(self._writer, grid.clip_ratio, scales)
        else:
            kind, width, count, scale_type = ir.DataType.UINT8, head_dim // 2, 2, ir.DataType.FLOAT16
            heads = (HeadGrid(halves, grid.clip_ratio),)
            way = FourBits(self._writer, InFloat16(self._writer), heads, head_dim, scales)
        kept = way.kept(node, x)
        retype(place.past, kind, width)
        new = self._writer.add(node, "Cast", kept.integers, to=int(kind))
        joined = self._writer.add(node, "Concat", place.past, new, axis=2)
        every = None if kept.scales is None else self._joined_scales(place, kept.scales, scale_type, count)
        real = way.values(node, joined, every)
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
        for user, index in consumers(place.present):
            user.replace_input_with(index, real)
        self._writer.editor.take_over(place.present, joined)
        self._graph.remove(place.concat, safe=True)
