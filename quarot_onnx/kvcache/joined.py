"""Integer caches of attentions that are spelt out: the Concat joins integers, the attention reads them times scales.

::

    new ── / s ── round ── int ──┐
    past ────────────────────────┴── Concat ──┬── · s ── attention
                                              └── present

s is fixed, or found for every token and head, s = max|x| · clip / (2^(b-1) - 1), and then kept in a cache of its own,
[batch, heads, positions, 1]. What is new is read rounded, too: a prefill computes what decoding it would. Of 4 bits the
first half of a head lies in the low halves of the bytes, the second half in the high ones.
"""

import numpy as np
import onnx_ir as ir

from quarot_onnx.emission.writer import Writer
from quarot_onnx.graph.query import consumers, data_input
from quarot_onnx.kvcache.integers import OFFSET, Floats, highest
from quarot_onnx.kvcache.places import JoinedPlace, retype
from quarot_onnx.quantization.activations import TINY


class JoinedCache:
    """Rewrites caches of one graph."""

    def __init__(self, model: ir.Model) -> None:
        """Write into ``model``."""
        self._graph, self._writer = model.graph, Writer(model)

    def write(self, place: JoinedPlace, bits: int, clip_ratio: float, scales: Floats | None) -> None:
        """Make one cache integers.

        Args:
            place: Where it is; its head_dim is even for 4 bits.
            bits: 8 or 4.
            clip_ratio: What the range of a token's head is multiplied by; fixed scales have it already.
            scales: Fixed ones, broadcast against [1, heads, 1, head_dim]; None for those of tokens.
        """
        past, node, dtype = place.past, place.concat, place.past.dtype
        assert dtype is not None, "a cache has a type"
        add, width = self._writer.add, place.attention.head_dim * bits // 8
        kind = ir.DataType.INT8 if bits == 8 else ir.DataType.UINT8
        x = self._writer.cast(node, data_input(node, 1), dtype, ir.DataType.FLOAT)
        if scales is None:
            own = self._of_tokens(node, x, bits, clip_ratio)
            every = self._joined_scales(place, own)
        else:
            own = every = self._writer.constant("cache_scale", scales)
        kept = self._kept(place, x, bits, own)
        retype(past, kind, width)
        joined = add(node, "Concat", past, add(node, "Cast", kept, to=int(kind)), axis=2)
        real = add(node, "Mul", self._numbers(node, joined, bits), every)
        self._take_over(place, joined, self._writer.cast(node, real, ir.DataType.FLOAT, dtype))
        retype(joined, kind, width)

    def _of_tokens(self, node: ir.Node, x: ir.Value, bits: int, clip_ratio: float) -> ir.Value:
        """A scale for each head of each token."""
        add = self._writer.add
        peak = self._writer.reduced(node, "ReduceMax", add(node, "Abs", x))
        if clip_ratio != 1:
            peak = add(node, "Mul", peak, self._number("clip_ratio", clip_ratio))
        scale = add(node, "Div", peak, self._number("steps", highest(bits)))
        return add(node, "Max", scale, self._number("tiny", float(TINY)))

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

    def _kept(self, place: JoinedPlace, x: ir.Value, bits: int, scale: ir.Value) -> ir.Value:
        """What is kept, as whole numbers: integers, or two of 4 bits in one, each plus 8, the second times 16."""
        add, top, node, head_dim = self._writer.add, highest(bits), place.concat, place.attention.head_dim
        integers = add(node, "Round", add(node, "Div", x, scale))
        integers = add(node, "Clip", integers, self._number("low", -top - 1), self._number("high", top))
        if bits == 8:
            return integers
        raised = add(node, "Add", integers, self._number("offset", OFFSET))
        low, high = (self._half(node, raised, head_dim, first=first) for first in (True, False))
        return add(node, "Add", low, add(node, "Mul", high, self._number("nibble", 16)))

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
        return add(node, "Sub", both, self._number("offset", OFFSET))

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

    def _number(self, stem: str, value: float) -> ir.Value:
        return self._writer.constant(stem, np.array(value, np.float32))
