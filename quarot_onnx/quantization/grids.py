"""Round to nearest: real numbers to integers with a scale and a zero point.

    q = clip(round(x / s) + z, q_min, q_max),    x ≈ s · (q - z)

Asymmetric: the range [min(x, 0), max(x, 0)], which always holds 0 exactly, is spread over all integers. Symmetric: the
range is [-max|x|, max|x|]; int8 leaves out -128, so that z = 0 and s = max|x| / 127, uint8 uses all integers, so that
z = 128 and s = max|x| / 127.5. (Jacob et al. 2018, section 2.1.) These are onnxruntime's grids, but for symmetric uint8
weights: these are int8 ones moved by 128, s = max|w| / 127, so that the type of the integers changes no result.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.errors import ModelError

_WEIGHT_HALF_SPAN = 127.0

Integers = NDArray[Any]
"""int8 or uint8."""


@dataclass(frozen=True)
class IntegerType:
    """An 8-bit integer type.

    Attributes:
        signed: int8, or uint8.
    """

    signed: bool

    @property
    def dtype(self) -> type[np.int8] | type[np.uint8]:
        """The NumPy type."""
        return np.int8 if self.signed else np.uint8

    @property
    def low(self) -> int:
        """The smallest integer."""
        return -128 if self.signed else 0

    @property
    def middle(self) -> int:
        """The zero point of a symmetric quantization."""
        return 0 if self.signed else 128

    @property
    def half_span(self) -> float:
        """Half the steps of a symmetric quantization."""
        return 127.0 if self.signed else 127.5


@dataclass(frozen=True, eq=False)
class Grid:
    """Scales and zero points.

    Attributes:
        scale: float32, a scalar array [] or [channels].
        zero_point: Of the integer type, the same shape.
    """

    scale: NDArray[np.float32]
    zero_point: Integers


def grid_for_range(
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    integers: IntegerType,
    *,
    symmetric: bool,
    half_span: float | None = None,
) -> Grid:
    """The grid that covers [low, high].

    Args:
        low: Smallest values, [] or [channels].
        high: Largest values, the same shape.
        integers: The integer type.
        symmetric: Whether zero lies in the middle.
        half_span: Half the steps of a symmetric grid; None for the type's.

    Returns:
        The grid; a range that holds only 0 gets the scale 1 and the zero point 0.
    """
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    half = integers.half_span if half_span is None else half_span
    scale = np.asarray(np.maximum(-low, high) / half if symmetric else (high - low) / 255.0)
    empty = scale < np.finfo(np.float32).tiny
    scale = np.where(empty, 1.0, scale)
    zero = np.full(scale.shape, float(integers.middle)) if symmetric else np.rint(integers.low - low / scale)
    zero = np.where(empty, 0.0, zero)
    return Grid(scale.astype(np.float32), zero.astype(integers.dtype))


def weight_grid(
    weight: NDArray[np.floating], integers: IntegerType, *, symmetric: bool, per_channel: bool, name: str
) -> Grid:
    """The grid of a weight from its true range.

    Args:
        weight: W: [in, out] (a table: [rows, hidden] with its rows as channels must come transposed).
        integers: The integer type.
        symmetric: Whether zero lies in the middle.
        per_channel: A grid for each of W's columns, else one for all.
        name: For messages.

    Returns:
        The grid, [out] or [].

    Raises:
        ModelError: The weight holds NaN or infinity.
    """
    axis = 0 if per_channel else None
    low, high = np.asarray(weight.min(axis=axis), np.float64), np.asarray(weight.max(axis=axis), np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ModelError(f"weight {name!r} holds NaN or infinity and cannot be quantized; exclude its node")
    return grid_for_range(low, high, integers, symmetric=symmetric, half_span=_WEIGHT_HALF_SPAN)


def round_to_nearest(weight: NDArray[np.floating], grid: Grid) -> Integers:
    """The integers of a weight.

    Args:
        weight: W: [in, out].
        grid: [] or [out].

    Returns:
        [in, out] of the grid's integer type; symmetric int8 stays within ±127 by its scale.
    """
    integers = grid.zero_point.dtype
    limits = np.iinfo(integers)
    result = np.empty(weight.shape, dtype=integers)
    rows = max(1, 2**22 // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        part = np.rint(weight[start : start + rows].astype(np.float64) / grid.scale) + grid.zero_point
        result[start : start + rows] = np.clip(part, limits.min, limits.max)
    return result
