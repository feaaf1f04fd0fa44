"""How far to shrink the range of a weight before rounding it.

A narrower range rounds most weights finer and cuts off a few. Of the shrink factors

    p = 1 - i / 100,    i = 0, 1, …, 79

each group keeps the one with the smallest Σ|w - s·p·(q - z)|^2.4 over its weights, the first of equals (the
convention of the code of GPTQ, Frantar et al. 2022, and QuaRot, Ashkboos et al. 2024). Both
ends of the range shrink alike, so that the zero point is that of p = 1.

Few factors are tried. Where a grid has few integers beside the weights that share it, lower bounds of all costs come
first (``bounds.py``): the factor with the lowest is tried, then those whose bound lies below what it cost. Elsewhere
the factors are tried in falling order, a few at a time. What lies beyond the range costs at least its distance to it,
and more the narrower the range: once that alone is above the smallest error so far, no factor to come can win, and the
column is done. Either way the choice is the one that trying all would make.

The search is made fast by staying inside the processor's cache, in float32, and on all cores; its sums are off by 1e-5
at most, so that of two factors whose errors are nearer than that either may be taken: always the same one, whatever
the number of cores.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.rounding.bounds import cost_bounds
from quarot_onnx.rounding.tiles import in_steps
from quarot_onnx.threads import spread

_STEPS, _MAX_SHRINK, _NORM = 100, 0.8, 2.4

_TILE = 32768
"""Weights looked at together: with two buffers, 384 kB of float32, which a core's own cache holds."""

_STEP = 6
"""Factors tried before it is asked which columns are done; the question costs as much as one factor."""

_ROUNDING = 1.0 + 1e-4
"""By what factor a bound must lie above an error, both being sums in float32."""

_NARROW, _SHARED = 32, 2
"""Bounds pay for grids of so many integers at most, and for so many weights for each of them at least."""


def shrink_factors() -> NDArray[np.float64]:
    """All p in falling order, 1 first."""
    return 1.0 - np.arange(int(_MAX_SHRINK * _STEPS)) / _STEPS


def best_factors(
    weight: NDArray[np.floating],
    scale: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    *,
    together: bool = False,
) -> NDArray[np.float64]:
    """The shrink factor of every column.

    Args:
        weight: Rows of W: [rows, out].
        scale: The steps at p = 1, [out].
        low: The smallest q - z, [out].
        high: The largest q - z, as far from the smallest in all columns, [out].
        together: Whether all columns, whose steps are the same, take the same factor.

    Returns:
        The p with the smallest error, [out], or [1] for all together.
    """
    rows, out = weight.shape
    if not out:
        return np.ones(1 if together else 0)
    levels = int(high[0] - low[0]) + 1
    narrow = levels <= _NARROW and rows >= _SHARED * levels
    # Columns with equal limits share a table of bounds.
    sort = narrow and not together and bool((low != low[0]).any())
    order = np.argsort(low, kind="stable") if sort else np.arange(out)
    width = max(1, _TILE // max(rows, 1))
    errors = np.empty((len(shrink_factors()), out)) if together else None
    numbers = np.zeros(out, np.intp)

    def search(left: int) -> None:
        columns = order[left : left + width]
        part = weight[:, columns] if sort else weight[:, left : left + width]
        values = np.ascontiguousarray(in_steps(part, scale[columns]).T, np.float32)
        tile = _Tile(values, low[columns, None].astype(np.float32), high[columns, None].astype(np.float32))
        if errors is not None:
            errors[:, columns] = _all(tile)
        else:
            numbers[columns] = _promising(tile, levels) if narrow else _falling(tile)

    spread(search, range(0, out, width))
    if errors is not None:
        numbers = errors.sum(axis=1, keepdims=True).argmin(axis=0)
    return shrink_factors()[numbers]


_Indices = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class _Tile:
    """Columns that are searched together.

    Attributes:
        values: Weights in units of the scale, [columns, rows].
        low: The smallest integers, [columns, 1].
        high: The largest integers, [columns, 1].
    """

    values: NDArray[np.float32]
    low: NDArray[np.float32]
    high: NDArray[np.float32]

    def pick(self, columns: _Indices) -> "_Tile":
        """Some of the columns, or one more than once."""
        return _Tile(self.values[columns], self.low[columns], self.high[columns])

    def costs(self, numbers: _Indices) -> NDArray[np.float64]:
        """What factors cost the columns, one each: [columns]."""
        exact = self._divided(numbers)
        return self._sum(np.rint(exact), exact, numbers)

    def beyond(self, numbers: _Indices) -> NDArray[np.float64]:
        """What is left of that if all within the range cost nothing: [columns]."""
        exact = self._divided(numbers)
        return self._sum(exact.copy(), exact, numbers)

    def _divided(self, numbers: _Indices) -> NDArray[np.float32]:
        return self.values * _constants(_NORM)[0][numbers, None]

    def _sum(self, nearest: NDArray[np.float32], exact: NDArray[np.float32], numbers: _Indices) -> NDArray[np.float64]:
        """Σ |e|^norm of each column: |e|^norm is exp(norm/2 · log e²), far faster than a power."""
        np.maximum(nearest, self.low, out=nearest)
        np.minimum(nearest, self.high, out=nearest)
        error = np.subtract(nearest, exact, out=nearest)
        np.multiply(error, error, out=error)
        with np.errstate(divide="ignore"):  # log 0 = -inf, and exp -inf = 0 again
            np.log(error, out=error)
        np.multiply(error, np.float32(_NORM / 2), out=error)
        np.exp(error, out=error)
        sums: NDArray[np.float32] = error.sum(axis=1)
        return sums * _constants(_NORM)[1][numbers]


@cache
def _constants(norm: float) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """1/p and p^norm of every factor."""
    factors = shrink_factors()
    return (1.0 / factors).astype(np.float32), np.array([factor**norm for factor in factors])


def _all(tile: _Tile) -> NDArray[np.float64]:
    """What all factors cost, [factors, columns]."""
    columns = len(tile.values)
    return np.array([tile.costs(np.full(columns, number)) for number in range(len(shrink_factors()))])


def _promising(tile: _Tile, levels: int) -> _Indices:
    """The cheapest factor of each column, among those that lower bounds leave open."""
    bounds = cost_bounds(tile.values, tile.low[:, 0], levels, tuple(shrink_factors().tolist()), _NORM)
    every = np.arange(len(bounds))
    lowest: _Indices = bounds.argmin(axis=1)
    first = tile.costs(lowest)
    left = bounds <= (first * _ROUNDING)[:, None]
    left[every, lowest] = True
    columns, numbers = np.nonzero(left)
    costs = first[columns]
    others = np.flatnonzero(numbers != lowest[columns])
    for start in range(0, len(others), len(bounds)):
        some = others[start : start + len(bounds)]
        costs[some] = tile.pick(columns[some]).costs(numbers[some])
    least = np.minimum.reduceat(costs, np.searchsorted(columns, every))
    cheapest = np.flatnonzero(costs == least[columns])[::-1]
    lowest[columns[cheapest]] = numbers[cheapest]  # Of equals the first, which is written last.
    return lowest


def _falling(tile: _Tile) -> _Indices:
    """The cheapest factor of each column, all tried in falling order until no other can win."""
    total, columns = len(shrink_factors()), np.arange(len(tile.values))
    best, least = np.zeros(len(columns), np.intp), np.full(len(columns), np.inf)
    for number in range(total):
        numbers = np.full(len(columns), number)
        costs = tile.costs(numbers)
        better = costs < least
        best[columns[better]] = number
        least = np.minimum(least, costs)
        if (number + 1) % _STEP or number + 1 == total:
            continue
        open_ = tile.beyond(numbers) <= least * _ROUNDING
        if not open_.all():
            tile, columns, least = tile.pick(np.flatnonzero(open_)), columns[open_], least[open_]
        if not len(columns):
            break
    return best
