"""How activations are quantized, and what that makes of them in NumPy.

The emitter writes the same arithmetic as a graph, operation for operation in float32, so that calibration sees what the
finished model computes. Two results can differ only where x/s falls on a half and is rounded to the other side.

Eight bits per token, a = clip · max|x| over the last axis (this is how MatMulIntegerToFloat wants it)::

    q = clip(round((x / a) · 127) + 128, 0, 255),    x ≈ a · (q - 128) / 127

Any number of bits for studies, per token or per token and group of features (Ashkboos et al. 2024, QuaRot, section 4)::

    symmetric     s = clip · max|x| / (2^(b-1) - 1)    q = clip(round(x / s), -2^(b-1), 2^(b-1) - 1)    x ≈ s · q
    asymmetric    l = clip · min(x, 0), h = clip · max(x, 0), s = (h - l) / (2^b - 1), z = round(-l / s)
                  q = clip(round(x / s) + z, 0, 2^b - 1)    x ≈ s · (q - z)

or for the whole tensor, by the same formulas with the least and the largest value of calibration for min x and max x.
"""

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.quantization.grids import Grid, IntegerType, grid_for_range

Floats = NDArray[np.float32]

TINY = np.float32(1e-30)
"""Stands in for the maximum, and for the scale, of a row of zeros."""

UNIT_GRID = Grid(np.array(1 / 127, dtype=np.float32), np.array(128, dtype=np.uint8))
"""The grid of a row that was divided by its maximum."""


@dataclass(frozen=True)
class PerToken:
    """Quantize each row of the activation by its own maximum, symmetric, 8 bits.

    Attributes:
        clip_ratio: What the maximum is multiplied by; above 0, at most 1.
    """

    clip_ratio: float = 1.0

    def __post_init__(self) -> None:
        """Check our own callers."""
        assert 0 < self.clip_ratio <= 1, self.clip_ratio


@dataclass(frozen=True, eq=False)
class Static:
    """Quantize the activation on one fixed grid of 8 or 16 bits.

    Attributes:
        grid: Scalar scale and zero point.
    """

    grid: Grid


@dataclass(frozen=True)
class FakeQuantized:
    """Round the activation to few values and go on in float: what all ways of doing so have in common.

    Attributes:
        bits: 2 to 16.
        symmetric: Whether 0 lies in the middle.
    """

    bits: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        """Check our own callers."""
        assert 2 <= self.bits <= 16, self.bits

    @property
    def low(self) -> int:
        """The smallest integer."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        """The largest integer: the number of steps in the range."""
        return self.low + (1 << self.bits) - 1


@dataclass(frozen=True)
class FakePerToken(FakeQuantized):
    """Round each row of the activation, or each group of features in it, and go on in float.

    Attributes:
        bits: 2 to 16.
        symmetric: Whether 0 lies in the middle.
        group_size: Consecutive features that share a scale, a divisor of their number; None for the whole row.
        clip_ratio: What the range is multiplied by; above 0, at most 1.
    """

    group_size: int | None = None
    clip_ratio: float = 1.0

    def __post_init__(self) -> None:
        """Check our own callers."""
        super().__post_init__()
        assert 0 < self.clip_ratio <= 1, self.clip_ratio


@dataclass(frozen=True)
class FakeStatic(FakeQuantized):
    """Round the whole activation on one fixed grid and go on in float.

    Attributes:
        bits: 2 to 16.
        symmetric: Whether 0 lies in the middle.
        scale: A float32, above 0.
        zero_point: The integer of 0; 0 where symmetric.
    """

    scale: float = field(kw_only=True)
    zero_point: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        """Check our own callers."""
        super().__post_init__()
        assert 0 < self.scale == float(np.float32(self.scale)), self.scale
        assert self.zero_point == 0 if self.symmetric else 0 <= self.zero_point <= self.high, self.zero_point

    @classmethod
    def for_range(cls, low: float, high: float, bits: int, *, symmetric: bool) -> Self:
        """The grid that covers [low, high] and 0.

        Args:
            low: The smallest value.
            high: The largest value.
            bits: 2 to 16.
            symmetric: Whether 0 lies in the middle.

        Returns:
            The grid; a range that holds only 0 gets the scale 1 and the zero point 0, as 8-bit grids do.
        """
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max(-low, high) / ((1 << (bits - 1)) - 1) if symmetric else (high - low) / ((1 << bits) - 1)
        if scale < np.finfo(np.float32).tiny:
            return cls(bits, symmetric, scale=1.0)
        zero = 0 if symmetric else round(-low / scale)
        return cls(bits, symmetric, scale=float(np.float32(scale)), zero_point=zero)


def on_fixed_grid(low: float, high: float, integers: IntegerType, *, symmetric: bool) -> Static | FakeStatic:
    """What is done to an activation with one scale: integers of 8 or 16 bits, fewer are rounded to in float.

    Args:
        low: The smallest value that the grid covers.
        high: The largest one.
        integers: Bits, and whether integers are signed.
        symmetric: Whether 0 lies in the middle.
    """
    if integers.bits < 8:
        return FakeStatic.for_range(low, high, integers.bits, symmetric=symmetric)
    return Static(grid_for_range(np.asarray(low), np.asarray(high), integers, symmetric=symmetric))


Activation = PerToken | Static | FakePerToken | FakeStatic | None


def round_trip(x: Floats, activation: Activation) -> Floats:
    """An activation after quantization and back.

    Args:
        x: [..., features] float32.
        activation: How it is quantized; None leaves it as it is.

    Returns:
        The shape of ``x``, float32.
    """
    match activation:
        case None:
            return x
        case PerToken(clip_ratio=clip_ratio):
            return per_token(x, clip_ratio)
        case Static(grid=grid):
            return static(x, grid)
        case FakePerToken(bits=bits, symmetric=symmetric, group_size=group_size, clip_ratio=clip_ratio):
            return fake_quantize(x, bits, symmetric=symmetric, group_size=group_size, clip_ratio=clip_ratio)
        case FakeStatic(scale=scale, zero_point=zero_point):
            zero = None if activation.symmetric else np.float32(zero_point)
            return _on_grid(np.asarray(x, np.float32), np.float32(scale), zero, activation)


def fake_quantize(
    x: Floats, bits: int, *, symmetric: bool, group_size: int | None = None, clip_ratio: float = 1.0
) -> Floats:
    """The values of ``x`` on grids of their own for each row, or for each group of features in a row.

    Args:
        x: [..., features] float32.
        bits: 2 to 16.
        symmetric: Whether 0 lies in the middle.
        group_size: A divisor of the number of features; None for the whole row.
        clip_ratio: What the range is multiplied by.

    Returns:
        The shape of ``x``, float32; rows of zeros stay zeros.
    """
    kind = FakePerToken(bits, symmetric, group_size, clip_ratio)
    size = group_size or x.shape[-1]
    assert x.shape[-1] % size == 0, (x.shape, group_size)
    groups = np.asarray(x, np.float32).reshape(*x.shape[:-1], x.shape[-1] // size, size)
    clip, steps = np.float32(clip_ratio), np.float32(kind.high)
    if symmetric:
        scale = np.maximum(np.abs(groups).max(axis=-1, keepdims=True) * clip / steps, TINY)
        zero = None
    else:
        low = np.minimum(groups.min(axis=-1, keepdims=True), np.float32(0)) * clip
        high = np.maximum(groups.max(axis=-1, keepdims=True), np.float32(0)) * clip
        scale = np.maximum((high - low) / steps, TINY)
        zero = np.rint(-low / scale)
    return _on_grid(groups, scale, zero, kind).reshape(x.shape)


def _on_grid(x: Floats, scale: Floats | np.float32, zero: Floats | np.float32 | None, kind: FakeQuantized) -> Floats:
    """The values of ``x`` on grids whose scales and zero points broadcast against it."""
    integers: Floats = np.rint(x / scale)
    if zero is not None:
        integers += zero
    np.clip(integers, kind.low, kind.high, out=integers)
    if zero is not None:
        integers -= zero
    integers *= scale
    return integers


def per_token(x: Floats, clip_ratio: float = 1.0) -> Floats:
    """The values of ``x`` on symmetric 8-bit grids of their own for each row.

    Args:
        x: [..., features] float32.
        clip_ratio: What the maximum of a row is multiplied by.

    Returns:
        The shape of ``x``, float32; rows of zeros stay zeros.
    """
    x = np.asarray(x, np.float32)
    amax = np.maximum(np.abs(x).max(axis=-1, keepdims=True) * np.float32(clip_ratio), TINY)
    result = static(x / amax, UNIT_GRID)
    result *= amax
    return result


def static(x: Floats, grid: Grid) -> Floats:
    """The values of ``x`` on one fixed grid.

    Args:
        x: Any shape, float32.
        grid: Scalar scale and zero point, of 8 or 16 bits.

    Returns:
        The shape of ``x``, float32.
    """
    limits = np.iinfo(grid.zero_point.dtype)
    zero = np.float32(grid.zero_point)
    integers: Floats = np.rint(np.asarray(x, np.float32) / grid.scale)
    integers += zero
    np.clip(integers, limits.min, limits.max, out=integers)
    integers -= zero
    integers *= grid.scale
    return integers
