"""Keys and values as bytes and back, as nodes: what every cache of integers in a graph holds of a head of a token.

::

    8 bits    s = max|x| · clip / 127            one scale of a head
    4 bits    s = -x_f · clip / 2^(b-1),         one of each half of a head,
              x_f the entry farthest from 0, sign and all

so that x_f becomes the lowest integer, which a grid for -7 to 7 would leave unused: steps are an eighth shorter
(llama.cpp's Q4_0 does so with weights). An entry of the first half of a head and one of the second share a byte, with 4
bits each, or with 5 and 3 (`Halves`).

Scales are fixed, or found at run time and then kept: beside the integers, as float32 or float16, or in the same row of
bytes, as the number of an entry in a table::

    s = ± exp(c / 1024 - 16),   c = 0 ... 32767,   its number c, + 32768 where s is negative, in two bytes

which is as fine as float16 (half a step is 1/2048 of s), and reaches from 1e-7 to 9e6.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.emission.activation import ActivationWriter
from quarot_onnx.emission.writer import Writer
from quarot_onnx.kvcache.integers import Floats, Halves
from quarot_onnx.quantization.activations import TINY, FakePerToken

_LARGEST = float(np.finfo(np.float16).max)
_FINE, _REACH, _CODES = 1024, 16, 1 << 15


@dataclass(frozen=True)
class HeadGrid:
    """How 4 bits on average are laid out in a head.

    Attributes:
        halves: How two entries share a byte.
        clip_ratio: What the range of a half is multiplied by.
    """

    halves: Halves
    clip_ratio: float


@dataclass(frozen=True, eq=False)
class Kept:
    """What a cache keeps of what is new.

    Attributes:
        integers: As whole numbers in float32, [batch, heads, seq, bytes of a head].
        scales: [batch, heads, seq, entries for the scales of a head]; None for fixed ones.
        factors: What it stands for, times each other, in the codec's own shape.
    """

    integers: ir.Value
    scales: ir.Value | None
    factors: tuple[ir.Value, ir.Value]


class ScaleCode(Protocol):
    """How scales are kept.

    Attributes:
        entries: What the last axis has of each scale, once kept.
    """

    entries: int

    def kept(self, anchor: ir.Node, scales: ir.Value) -> tuple[ir.Value, ir.Value]:
        """What is kept of scales, and what they are read as."""
        ...

    def read(self, anchor: ir.Node, kept: ir.Value) -> ir.Value:
        """Scales in float32, of what was kept."""
        ...


class InFloat16:
    """Scales as float16."""

    entries = 1

    def __init__(self, writer: Writer) -> None:
        """Write with ``writer``."""
        self._writer = writer

    def kept(self, anchor: ir.Node, scales: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Rounded, within the range of float16."""
        add, number = self._writer.add, self._writer.number
        limited = add(anchor, "Clip", scales, number("least", -_LARGEST), number("largest", _LARGEST))
        half = add(anchor, "Cast", limited, to=int(ir.DataType.FLOAT16))
        return half, self.read(anchor, half)

    def read(self, anchor: ir.Node, kept: ir.Value) -> ir.Value:
        """As they are divided and multiplied by: those of zeros are none."""
        exact = self._writer.add(anchor, "Cast", kept, to=int(ir.DataType.FLOAT))
        return self._writer.add(anchor, "Add", exact, self._writer.number("tiny", TINY))


class InTwoBytes:
    """Scales as two bytes each, [..., 1] as [..., 2], uint8."""

    entries = 2

    def __init__(self, writer: Writer) -> None:
        """Write with ``writer``."""
        self._writer = writer
        sizes = np.exp(np.arange(_CODES) / _FINE - _REACH).astype(np.float32)
        self._scales = writer.constant("scales", np.concatenate([sizes, -sizes]))
        self._bytes = writer.constant("scale_bytes", np.arange(2 * _CODES, dtype="<u2").view(np.uint8).reshape(-1, 2))

    def kept(self, anchor: ir.Node, scales: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The nearest of the table."""
        add, number = self._writer.add, self._writer.number
        steps = add(anchor, "Mul", add(anchor, "Log", add(anchor, "Abs", scales)), number("fine", _FINE))
        codes = add(anchor, "Round", add(anchor, "Add", steps, number("reach", _FINE * _REACH)))
        codes = add(anchor, "Clip", codes, number("zero", 0.0), number("last", _CODES - 1))
        negative = add(anchor, "Less", scales, number("zero", 0.0))
        second = add(anchor, "Where", negative, number("codes", _CODES), number("zero", 0.0))
        numbers = add(anchor, "Cast", add(anchor, "Add", codes, second), to=int(ir.DataType.INT32))
        apart = add(anchor, "Gather", self._bytes, numbers, axis=0)
        return apart, add(anchor, "Gather", self._scales, numbers, axis=0)

    def read(self, anchor: ir.Node, kept: ir.Value) -> ir.Value:
        """By their numbers."""
        parts = self._writer.constant("places", np.array([[1], [256]], np.int32))
        whole = self._writer.add(anchor, "Cast", kept, to=int(ir.DataType.INT32))
        return self._writer.add(
            anchor, "Gather", self._scales, self._writer.add(anchor, "MatMul", whole, parts), axis=0
        )


class Codec(Protocol):
    """How entries of a head are kept."""

    def kept(self, anchor: ir.Node, x: ir.Value) -> Kept:
        """What is kept of ``x`` [batch, heads, positions, head_dim], float32."""
        ...

    def values(self, anchor: ir.Node, integers: ir.Value, scales: ir.Value | None) -> ir.Value:
        """What integers stand for, float32: as the cache holds them, and the scales that were kept with them."""
        ...


class EightBits:
    """An entry is a byte; scales are kept as they are, float32."""

    def __init__(self, writer: Writer, clip_ratio: float, fixed: Floats | None = None) -> None:
        """Write with ``writer``.

        Args:
            writer: Of the graph.
            clip_ratio: What the range of a head is multiplied by.
            fixed: Scales in place of those of tokens, broadcast against [1, heads, 1, head_dim].
        """
        self._writer, self._activations = writer, ActivationWriter(writer)
        self._rounding = FakePerToken(8, clip_ratio=clip_ratio)
        self._fixed = None if fixed is None else writer.constant("cache_scale", fixed)

    def kept(self, anchor: ir.Node, x: ir.Value) -> Kept:
        """What is kept of ``x``."""
        own = None if self._fixed is not None else self._activations.row_scales(anchor, x, self._rounding)
        scale = self._fixed or own
        assert scale is not None, "one of the two"
        integers = self._activations.integers(anchor, x, scale, None, self._rounding)
        return Kept(integers, own, (integers, scale))

    def values(self, anchor: ir.Node, integers: ir.Value, scales: ir.Value | None) -> ir.Value:
        """What they stand for."""
        scale = self._fixed or scales
        assert scale is not None, "one of the two"
        real = self._writer.add(anchor, "Cast", integers, to=int(ir.DataType.FLOAT))
        return self._writer.add(anchor, "Mul", real, scale)


class FourBits:
    """4 bits on average: [..., head_dim] is seen as [..., 2, head_dim / 2]."""

    def __init__(
        self,
        writer: Writer,
        scales: ScaleCode,
        heads: Sequence[HeadGrid],
        head_dim: int,
        fixed: Floats | None = None,
    ) -> None:
        """Write with ``writer``.

        Args:
            writer: Of the graph.
            scales: How they are kept.
            heads: The grid of each head, or one for all.
            head_dim: Of all.
            fixed: As for `EightBits`.
        """
        self._writer, self._code, self._heads, self._head_dim = writer, scales, heads, head_dim
        self._lowest = np.stack([head.halves.lowest for head in heads])
        self._places = np.stack([[1, 1 << head.halves.first] for head in heads]).astype(np.float32)
        self._fixed = None
        if fixed is not None:
            apart = fixed.reshape(*fixed.shape[:3], *((2, -1) if fixed.shape[3] > 1 else (1, 1)))
            self._fixed = writer.constant("cache_scale", apart)

    def kept(self, anchor: ir.Node, x: ir.Value) -> Kept:
        """What is kept of ``x``: scales, and integers, each plus what makes it positive, in one whole number."""
        add = self._writer.add
        rows, own = self._shaped(anchor, x, 2, self._head_dim // 2), None
        scale = self._fixed
        if scale is None:
            kept, scale = self._code.kept(anchor, self._scales(anchor, rows))
            own = self._shaped(anchor, kept, 2 * self._code.entries)
        rounded = add(anchor, "Round", add(anchor, "Div", rows, scale))
        low, high = self._each("lowest", self._lowest), self._each("highest", -1 - self._lowest)
        integers = add(anchor, "Min", add(anchor, "Max", rounded, low), high)
        together = self._writer.summed(anchor, add(anchor, "Mul", integers, self._each("places", self._places)), axis=3)
        middle = self._whole("middle", -(self._lowest * self._places).sum(axis=1))
        return Kept(add(anchor, "Add", together, middle), own, (integers, scale))

    def rounded(self, anchor: ir.Node, kept: Kept) -> ir.Value:
        """What is read of what was kept, in fewer nodes than `values`."""
        return self._shaped(anchor, self._writer.add(anchor, "Mul", *kept.factors), self._head_dim)

    def values(self, anchor: ir.Node, integers: ir.Value, scales: ir.Value | None) -> ir.Value:
        """What they stand for."""
        add = self._writer.add
        bits = np.array([[head.halves.first, head.halves.second] for head in self._heads], np.uint8)
        first, second = (self._whole("bits", bits[:, half]) for half in (0, 1))
        left = add(anchor, "BitShift", integers, second, direction="LEFT")
        low = add(anchor, "BitShift", left, second, direction="RIGHT")
        high = add(anchor, "BitShift", integers, first, direction="RIGHT")
        both = add(anchor, "Cast", add(anchor, "Concat", low, high, axis=-1), to=int(ir.DataType.FLOAT))
        apart = self._shaped(anchor, both, 2, self._head_dim // 2)
        scale = self._fixed
        if scale is None:
            assert scales is not None, "kept with them"
            scale = self._code.read(anchor, self._shaped(anchor, scales, 2, self._code.entries))
        real = add(anchor, "Mul", add(anchor, "Add", apart, self._each("lowest", self._lowest)), scale)
        return self._shaped(anchor, real, self._head_dim)

    def _scales(self, anchor: ir.Node, rows: ir.Value) -> ir.Value:
        """The scale of each row under which its entry farthest from 0 is the lowest integer, [..., 2, 1]."""
        add = self._writer.add
        highest, lowest = (self._writer.reduced(anchor, op, rows) for op in ("ReduceMax", "ReduceMin"))
        farther = add(anchor, "Greater", highest, add(anchor, "Neg", lowest))
        farthest = add(anchor, "Where", farther, highest, lowest)
        clip = np.array([[head.clip_ratio] for head in self._heads], np.float32)
        return add(anchor, "Mul", farthest, self._each("parts", clip / self._lowest))

    def _each(self, stem: str, values: NDArray[np.float32]) -> ir.Value:
        """A number for each half of each head, [heads, 2]."""
        shape = (2, 1) if len(self._heads) == 1 else (-1, 1, 2, 1)
        return self._writer.constant(stem, values.astype(np.float32).reshape(shape))

    def _whole(self, stem: str, values: NDArray[Any]) -> ir.Value:
        """A number for each head, [heads]."""
        return self._writer.constant(stem, values.reshape(() if len(self._heads) == 1 else (-1, 1, 1)))

    def _shaped(self, anchor: ir.Node, x: ir.Value, *shape: int) -> ir.Value:
        """[batch, heads, positions, *shape]."""
        return self._writer.add(
            anchor, "Reshape", x, self._writer.constant("halves", np.array([0, 0, 0, *shape], np.int64))
        )
