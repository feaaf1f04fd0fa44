"""Integer caches of attentions that are spelt out: the Concat joins integers, the attention reads them times scales.

::

    new ── / s ── round ── int ──┐
    past ────────────────────────┴── Concat ──┬── · s ── attention
                                              └── present

s is fixed, or found for every token and head and then kept in a cache of its own, [batch, heads, positions, 1]:

    8 bits    s = max|x| · clip / 127
    4 bits    s = -x_f · clip / 8,  x_f the entry farthest from 0, sign and all

so that x_f becomes -8, which a grid for -7 to 7 would leave unused: steps are an eighth shorter, and the farthest entry
is exact (llama.cpp's Q4_0 does so with weights). What is new is read rounded, too: a prefill computes what decoding it
would. Of 4 bits the first half of a head lies in the low halves of the bytes, the second half in the high ones.
"""

import numpy as np
import onnx_ir as ir

from quarot_onnx.config.kv_cache import CacheGrid
from quarot_onnx.emission.activation import ActivationWriter
from quarot_onnx.emission.writer import Writer
from quarot_onnx.graph.query import consumers, data_input
from quarot_onnx.kvcache.integers import OFFSET, Floats
from quarot_onnx.kvcache.places import JoinedPlace, retype
from quarot_onnx.quantization.activations import TINY, FakePerToken


class JoinedCache:
    """Rewrites caches of one graph."""

    def __init__(self, model: ir.Model) -> None:
        """Write into ``model``."""
        self._graph, self._writer = model.graph, Writer(model)
        self._activations = ActivationWriter(self._writer)

    def write(self, place: JoinedPlace, grid: CacheGrid, scales: Floats | None) -> None:
        """Make one cache integers.

        Args:
            place: Where it is; its head_dim is even for 4 bits.
            grid: Symmetric, of 8 or 4 bits; fixed scales have its clip ratio already.
            scales: Fixed ones, broadcast against [1, heads, 1, head_dim]; None for those of tokens.
        """
        past, node, dtype, bits = place.past, place.concat, place.past.dtype, grid.bits
        assert dtype is not None, "a cache has a type"
        assert bits is not None, "or nothing is rounded"
        add, width = self._writer.add, place.attention.head_dim * bits // 8
        kind = ir.DataType.INT8 if bits == 8 else ir.DataType.UINT8
        rounding = FakePerToken(bits, clip_ratio=grid.clip_ratio)
        x = self._activations.as_float(node, data_input(node, 1), dtype)
        if scales is None:
            own = self._activations.row_scales(node, x, rounding) if bits == 8 else self._signed_scales(node, x, grid)
            every = self._joined_scales(place, own)
        else:
            own = every = self._writer.constant("cache_scale", scales)
        kept = self._activations.integers(node, x, own, None, rounding)
        if bits == 4:
            kept = self._packed(node, kept, place.attention.head_dim)
        retype(past, kind, width)
        joined = add(node, "Concat", past, add(node, "Cast", kept, to=int(kind)), axis=2)
        real = add(node, "Mul", self._numbers(node, joined, bits), every)
        self._take_over(place, joined, self._writer.cast(node, real, ir.DataType.FLOAT, dtype))
        retype(joined, kind, width)

    def _signed_scales(self, node: ir.Node, x: ir.Value, grid: CacheGrid) -> ir.Value:
        """The scale of each row under which its entry farthest from 0 is the lowest integer, [..., 1]."""
        add, number = self._writer.add, self._writer.number
        highest, lowest = (self._writer.reduced(node, op, x) for op in ("ReduceMax", "ReduceMin"))
        farther = add(node, "Greater", highest, add(node, "Neg", lowest))
        farthest = add(node, "Where", farther, highest, lowest)
        # A row of zeros gets a scale that is none.
        return add(
            node, "Mul", add(node, "Add", farthest, number("tiny", TINY)), number("eighth", -grid.clip_ratio / OFFSET)
        )

    def _joined_scales(self, place: JoinedPlace, own: ir.Value) -> ir.Value:
        """The scales of all positions: those that came in, and those of what is new."""
        editor, number = self._writer.editor, ir.TensorType(ir.DataType.FLOAT)
        assert place.past.shape is not None, "looked at before"
        rows = ir.Shape([*place.past.shape[:3], 1])
        past = ir.Value(name=editor.unique(f"{place.past.name}_scale"), shape=rows, type=number)
        self._graph.inputs.append(past)
        joined = self._writer.add(place.concat, "Concat", past, own, axis=2)
        joined.name, joined.type = editor.unique(f"{place.present.name}_scale"), number
        joined.shape = ir.Shape([*(place.present.shape or rows)[:3], 1])
        self._graph.outputs.append(joined)
        return joined

    def _packed(self, node: ir.Node, integers: ir.Value, head_dim: int) -> ir.Value:
        """Two integers of 4 bits in one whole number: each plus 8, the second times 16."""
        add = self._writer.add
        raised = add(node, "Add", integers, self._writer.number("offset", OFFSET))
        low, high = (self._half(node, raised, head_dim, first=first) for first in (True, False))
        return add(node, "Add", low, add(node, "Mul", high, self._writer.number("nibble", 16)))

    def _half(self, node: ir.Node, x: ir.Value, head_dim: int, *, first: bool) -> ir.Value:
        """The first or the second half of the entries of a head."""
        start, stop = (0, head_dim // 2) if first else (head_dim // 2, head_dim)
        places = [self._writer.constant("slice", np.array([value], np.int64)) for value in (start, stop, -1)]
        return self._writer.add(node, "Slice", x, *places)

    def _numbers(self, node: ir.Node, kept: ir.Value, bits: int) -> ir.Value:
        """The integers of a cache in float."""
        add = self._writer.add
        if bits == 8:
            return add(node, "Cast", kept, to=int(ir.DataType.FLOAT))
        four = self._writer.constant("four", np.array(4, np.uint8))
        low = add(node, "BitShift", add(node, "BitShift", kept, four, direction="LEFT"), four, direction="RIGHT")
        high = add(node, "BitShift", kept, four, direction="RIGHT")
        both = add(node, "Cast", add(node, "Concat", low, high, axis=-1), to=int(ir.DataType.FLOAT))
        return add(node, "Sub", both, self._writer.number("offset", OFFSET))

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
