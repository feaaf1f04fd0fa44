"""float16 to float32 and back, with NumPy's own results at a fraction of its time.

NumPy converts float16 number by number. Here a few passes over integers and floats do it, each a vector loop:

* widen: the bits of a float16, shifted to their place in a float32, are those of x · 2⁻¹¹² (the biases of the
  exponents differ by 112), subnormal numbers included; a product with 2¹¹² is exact.
* narrow: for 2^e ≤ |x| < 2^(e+1), float32's sum x + 1.5 · 2^(e+13) keeps 10 bits behind the leading one of x, rounded
  to nearest, ties to even; with e ≥ −14 that is float16's grid, subnormal numbers included. Taking the same off again
  and multiplying by 2⁻¹¹² is exact, and leaves float16's bits, shifted.

Numbers beyond float16's range, infinity and NaN are left to NumPy.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
"""The floats of 16 bits, which onnxruntime computes with as 32-bit ones on a CPU."""

_SLICE = 1 << 16
"""Elements at a time: what a pass writes is still in the cache for the next one."""

_SHIFT, _BIAS = 13, np.float32(2.0**112)
_PLACE = np.int32(~0x7FFFFFFF | 0x0FFFE000)  # sign, exponent and fraction of a shifted float16
_EXPONENT = np.int32(0x7F800000)
_SMALLEST_NORMAL = np.int32((127 - 14) << 23)
_RAISE = np.int32((13 << 23) | (1 << 22))  # times 2^13, and times 1.5
_SIGN = np.int32(0x8000)
_BEYOND = np.float32(2.0**16)


def widen(halves: NDArray[np.float16], out: NDArray[np.float32]) -> None:
    """Write float16 numbers into a float32 array, exactly.

    Args:
        halves: [rows, columns], in any layout.
        out: The same shape, C-contiguous.
    """
    stored = halves.view(np.int16)
    for start, stop in _slices(out.shape):
        part = out[start:stop]
        bits = part.view(np.int32)
        np.copyto(bits, stored[start:stop])
        np.left_shift(bits, _SHIFT, out=bits)
        np.bitwise_and(bits, _PLACE, out=bits)
        np.multiply(part, _BIAS, out=part)
        if not _within(part, _BEYOND):
            np.copyto(part, halves[start:stop])


def narrow(x: NDArray[np.float32], out: NDArray[np.float16]) -> None:
    """Round float32 numbers to float16: to nearest, ties to even, to infinity beyond the range.

    Args:
        x: [rows, columns], C-contiguous; overwritten.
        out: The same shape, in any layout.
    """
    stored = out.view(np.int16)
    slices = _slices(x.shape)
    scratch = np.empty((2, max((stop - start for start, stop in slices), default=0), x.shape[1]), np.int32)
    for start, stop in slices:
        part = x[start:stop]
        if not _within(part, _BEYOND):
            np.copyto(out[start:stop], part, casting="same_kind")
            continue
        bits, (sign, other) = part.view(np.int32), scratch[:, : stop - start]
        np.right_shift(bits, 16, out=sign)
        np.bitwise_and(sign, _SIGN, out=sign)  # rounded to nothing, a negative number keeps it
        grid = other.view(np.float32)
        np.bitwise_and(bits, _EXPONENT, out=other)
        np.maximum(other, _SMALLEST_NORMAL, out=other)
        np.add(other, _RAISE, out=other)
        np.add(part, grid, out=part)
        np.subtract(part, grid, out=part)
        np.multiply(part, 1 / _BIAS, out=part)
        np.right_shift(bits, _SHIFT, out=bits)
        np.bitwise_or(bits, sign, out=bits)
        np.copyto(stored[start:stop], bits, casting="same_kind")


def _slices(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Rows that are converted together."""
    rows, columns = shape
    step = max(1, _SLICE // max(1, columns))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _within(x: NDArray[np.float32], limit: np.float32) -> bool:
    """Whether all numbers are below the limit in size, and none is NaN."""
    return bool(x.max(initial=0.0) < limit and x.min(initial=0.0) > -limit)
