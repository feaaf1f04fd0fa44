"""A grid: the scale and the zero point between real numbers and integers; that of a static activation from its range.

    q = clip(round(x / s) + z, q_min, q_max),    x ≈ s · (q - z)

Asymmetric: the range [min(x, 0), max(x, 0)], which always holds 0 exactly, is spread over all integers. Symmetric: the
range is [-max|x|, max|x|]; int8 leaves out -128, so that z = 0 and s = max|x| / 127, uint8 uses all integers, so that
z = 128 and s = max|x| / 127.5; int16 and uint16 likewise. (Jacob et al. 2018, section 2.1.) These are
onnxruntime's grids. Those of weights are in
:mod:`quarot_onnx.rounding.grids`: there symmetric uint8 is int8 moved by 128, so that the type changes no result.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[Any]
"""int8, uint8, int16 or uint16, one integer an element, whatever the number of bits."""


@dataclass(frozen=True)
class IntegerType:
    """An integer type of 8 or 16 bits.

    Attributes:
        signed: int8, or uint8; int16, or uint16.
        bits: 8 or 16.
    """

    signed: bool
    bits: int = 8

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy type."""
        return np.dtype(f"{'int' if self.signed else 'uint'}{self.bits}")

    @property
    def low(self) -> int:
        """The smallest integer."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def middle(self) -> int:
        """The zero point of a symmetric quantization."""
        return 0 if self.signed else 1 << (self.bits - 1)

    @property
    def steps(self) -> int:
        """The steps from the smallest integer to the largest."""
        return (1 << self.bits) - 1

    @property
    def half_span(self) -> float:
        """Half the steps of a symmetric quantization."""
        return float(self.steps // 2) if self.signed else self.steps / 2


@dataclass(frozen=True, eq=False)
class Grid:
    """Scales and zero points.

    Attributes:
        scale: float32: of an activation [], of a weight [groups, out], or [1, 1] where one serves the whole matrix.
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
) -> Grid:
    """The grid that covers [low, high].

    Args:
        low: Smallest values, [] or [n].
        high: Largest values, the same shape.
        integers: The integer type.
        symmetric: Whether zero lies in the middle.

    Returns:
        The grid; a range that holds only 0 gets the scale 1 and the zero point 0.
    """
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    scale = np.asarray(np.maximum(-low, high) / integers.half_span if symmetric else (high - low) / integers.steps)
    empty = scale < np.finfo(np.float32).tiny
    scale = np.where(empty, 1.0, scale)
    zero = np.full(scale.shape, float(integers.middle)) if symmetric else np.rint(integers.low - low / scale)
    zero = np.where(empty, 0.0, zero)
    return Grid(scale.astype(np.float32), zero.astype(integers.dtype))
