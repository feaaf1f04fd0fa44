"""How far to shrink the range of a weight before rounding it.

A narrower range rounds most weights finer and cuts off a few. Of the shrink factors

    p = 1 - i / 100,    i = 0, 1, …, 79

each group keeps the one with the smallest Σ|w - s·p·(q - z)|^2.4 over its weights, the first of equals (the
convention of the code of GPTQ, Frantar et al. 2022, and QuaRot, Ashkboos et al. 2024). Both
ends of the range shrink alike, so that the zero point is that of p = 1.

The factors are tried in falling order, a few at a time. What lies beyond the range costs at least its distance to it,
and more the narrower the range: once that alone is above the smallest error so far, no factor to come can win, and the
column is done. The search is made fast by staying inside the processor's cache and in float32; its sums are off by 1e-5
at most, so that of two factors whose errors are nearer than that either may be taken.
"""

import numpy as np
from numpy.typing import NDArray

_STEPS, _MAX_SHRINK, _NORM = 100, 0.8, 2.4

_TILE = 32768
"""Weights looked at together: with two buffers, 384 kB of float32, which a core's own cache holds."""

_STEP = 6
"""Factors tried before it is asked which columns are done; the question costs as much as one factor."""

_ROUNDING = 1.0 + 1e-4
"""By what factor a bound must lie above an error, both being sums in float32."""


def shrink_factors() -> NDArray[np.float64]:
    """All p in falling order, 1 first."""
    return 1.0 - np.arange(int(_MAX_SHRINK * _STEPS)) / _STEPS


def shrink_errors(
    weight: NDArray[np.floating],
    scale: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    *,
    every: bool = False,
) -> NDArray[np.float64]:
    """What each shrink factor costs each column.

    Args:
        weight: Rows of W: [rows, out].
        scale: The steps at p = 1, [out].
        low: The smallest q - z, [out].
        high: The largest q - z, [out].
        every: Whether all costs are wanted, also of factors that cannot be a column's best.

    Returns:
        Σ over the rows of |w - s·p·(q - z)|^2.4 in units of s^2.4, [factors, out]; infinite where it was not found.
    """
    rows, out = weight.shape
    errors = np.full((len(shrink_factors()), out), np.inf)
    width = max(1, _TILE // max(rows, 1))
    for left in range(0, out, width):
        columns = slice(left, left + width)
        tile = np.ascontiguousarray((weight[:, columns] / scale[columns]).T, np.float32)
        limits = np.stack([low[columns], high[columns]]).astype(np.float32)[:, :, None]
        _search(errors[:, columns], tile, limits, every=every)
    return errors


def _search(
    errors: NDArray[np.float64],
    tile: NDArray[np.float32],
    limits: NDArray[np.float32],
    *,
    every: bool,
) -> None:
    """Fill in the errors [factors, columns] of a tile [columns, rows], whose limits are [2, columns, 1]."""
    factors, norm = shrink_factors(), _NORM
    half, left = np.float32(norm / 2), np.arange(len(tile))
    for start in range(0, len(factors), _STEP):
        exact, error = np.empty_like(tile), np.empty_like(tile)
        for number in range(start, min(start + _STEP, len(factors))):
            factor = factors[number]
            np.multiply(tile, np.float32(1.0 / factor), out=exact)
            np.rint(exact, out=error)
            _clamp(error, limits)
            np.subtract(error, exact, out=error)
            errors[number, left] = _powers(error, half) * factor**norm
        if every or start + _STEP >= len(factors):
            continue
        # Of what lies beyond the last range, the distance to it.
        np.copyto(error, exact)
        _clamp(error, limits)
        np.subtract(error, exact, out=error)
        bound = _powers(error, half) * factors[start + _STEP - 1] ** norm
        open_ = bound <= errors[:, left].min(axis=0) * _ROUNDING
        if not open_.all():
            tile, limits, left = tile[open_], limits[:, open_], left[open_]
        if not len(left):
            return


def _clamp(values: NDArray[np.float32], limits: NDArray[np.float32]) -> None:
    np.maximum(values, limits[0], out=values)
    np.minimum(values, limits[1], out=values)


def _powers(error: NDArray[np.float32], half_norm: np.float32) -> NDArray[np.float64]:
    """Σ |e|^norm of each row, in place: |e|^norm is exp(norm/2 · log e²), far faster than a power."""
    np.multiply(error, error, out=error)
    with np.errstate(divide="ignore"):  # log 0 = -inf, and exp -inf = 0 again
        np.log(error, out=error)
    np.multiply(error, half_norm, out=error)
    np.exp(error, out=error)
    return np.asarray(error.sum(axis=1), np.float64)
