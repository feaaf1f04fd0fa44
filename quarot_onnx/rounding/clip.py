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

The search is made fast by few passes over arrays that are used again, in float32, and on all cores; its sums are off by
1e-5 at most, so that of two factors whose errors are nearer than that either may be taken: always the same one,
whatever the number of cores.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.rounding.bounds import Family, cost_bounds
from quarot_onnx.rounding.tiles import in_steps, turn
from quarot_onnx.threads import Scratch, spread

_STEPS, _MAX_SHRINK, _NORM = 100, 0.8, 2.4

_TILE = 65536
"""Weights looked at together: enough that NumPy's loops take longer than their calls, and so few that what lies beside
them, 2 MB, stays near a core."""

_STEP = 6
"""Factors tried before it is asked which columns are done; the question costs as much as one factor."""

_ROUNDING = 1.0 + 1e-4
"""By what factor a bound must lie above an error, both being sums in float32."""

_TINY = 2.0**-96
"""By scales below, and above its reciprocal, weights are divided in float64: float32 does not hold what they become."""

_NARROW, _SHARED = 32, 2
"""Bounds pay for grids of so many integers at most, and for so many weights for each of them at least."""

_LIKELY, _FINE, _SHORT = 39, 16, 1024
"""So many factors are bounded one by one where a grid has so many integers or more and a column so many weights or
fewer: hardly any other wins there, and bounds are most of the time."""


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
    width = max(1, _TILE // max(rows, 1))
    single = _LIKELY if levels >= _FINE and rows <= _SHORT else len(_FACTORS)
    errors = np.empty((len(_FACTORS), out)) if together else None
    numbers = np.zeros(out, np.intp)

    def search(left: int) -> None:
        columns = slice(left, left + width)
        tile = _tile(weight[:, columns], scale[columns], low[columns], high[columns])
        with np.errstate(divide="ignore"):  # log 0 = -inf, and exp -inf = 0 again
            if errors is not None:
                errors[:, columns] = _all(tile)
            elif narrow:
                order = np.argsort(tile.low[:, 0], kind="stable")  # Columns with equal limits share a table of bounds.
                same = tile.low[order[0]] == tile.low[order[-1]]
                numbers[left + order] = _promising(tile if same else tile.pick(order), levels, single)
            else:
                numbers[columns] = _falling(tile)

    spread(search, range(0, out, width))
    if errors is not None:
        numbers = errors.sum(axis=1, keepdims=True).argmin(axis=0)
    return shrink_factors()[numbers]


_FACTORS = tuple(shrink_factors().tolist())
_PER_FACTOR, _POWERS = 1.0 / shrink_factors(), shrink_factors() ** _NORM
_Indices = NDArray[np.intp]
_scratch = Scratch()


@dataclass(frozen=True, eq=False)
class _Tile:
    """Columns that are searched together.

    Attributes:
        weights: [columns, rows].
        per_step: What they are multiplied by to be in units of the scale, [columns].
        low: The smallest integers, [columns, 1].
        high: The largest integers, [columns, 1].
    """

    weights: NDArray[np.float32]
    per_step: NDArray[np.float64]
    low: NDArray[np.float32]
    high: NDArray[np.float32]

    def pick(self, columns: _Indices) -> "_Tile":
        """Some of the columns, in another order, or one more than once."""
        return _Tile(self.weights[columns], self.per_step[columns], self.low[columns], self.high[columns])

    def costs(self, numbers: _Indices) -> NDArray[np.float64]:
        """What factors cost the columns, one each: [columns]."""
        exact = self._divided(numbers)
        return self._sum(np.rint(exact, out=_scratch.array("nearest", exact.shape, np.float32)), exact, numbers)

    def beyond(self, numbers: _Indices) -> NDArray[np.float64]:
        """What is left of that if all within the range cost nothing: [columns]."""
        exact = self._divided(numbers)
        return self._sum(exact.copy(), exact, numbers)

    def _divided(self, numbers: _Indices) -> NDArray[np.float32]:
        per_step = (self.per_step * _PER_FACTOR[numbers]).astype(np.float32)[:, None]
        exact: NDArray[np.float32] = _scratch.array("exact", self.weights.shape, np.float32)
        return np.multiply(self.weights, per_step, out=exact)

    def _sum(self, nearest: NDArray[np.float32], exact: NDArray[np.float32], numbers: _Indices) -> NDArray[np.float64]:
        """Σ |e|^norm of each column: |e|^norm is exp(norm · log |e|), far faster than a power."""
        np.maximum(nearest, self.low, out=nearest)
        np.minimum(nearest, self.high, out=nearest)
        error = np.subtract(nearest, exact, out=nearest)
        np.absolute(error, out=error)
        np.log(error, out=error)
        np.multiply(error, np.float32(_NORM), out=error)
        np.exp(error, out=error)
        sums: NDArray[np.float32] = error.sum(axis=1)
        return sums * _POWERS[numbers]


def _tile(
    part: NDArray[np.floating], scale: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]
) -> _Tile:
    """Columns of a weight, [rows, columns]; those of scales that float32 is short of at either end, in steps."""
    limits = (low[:, None].astype(np.float32), high[:, None].astype(np.float32))
    if scale.min() < _TINY or scale.max() > 1 / _TINY:
        return _Tile(np.ascontiguousarray(in_steps(part, scale).T, np.float32), np.ones(len(scale)), *limits)
    weights = _scratch.array("weights", part.shape[::-1], np.float32)
    turn(part, weights)
    return _Tile(weights, 1.0 / scale, *limits)


def _all(tile: _Tile) -> NDArray[np.float64]:
    """What all factors cost, [factors, columns]."""
    columns = len(tile.weights)
    return np.array([tile.costs(np.full(columns, number)) for number in range(len(_FACTORS))])


def _promising(tile: _Tile, levels: int, single: int) -> _Indices:
    """The cheapest factor of each column, among those that lower bounds leave open.

    Args:
        tile: The columns.
        levels: The integers of a grid.
        single: So many factors are bounded one by one; where others may win, all are.
    """
    bounds = cost_bounds(tile.weights, tile.per_step, tile.low[:, 0], Family(levels, _FACTORS, _NORM, single))
    lowest = np.minimum(bounds.argmin(axis=1), single - 1)
    first = tile.costs(lowest)
    open_ = bounds <= (first * _ROUNDING).astype(np.float32)[:, None]
    hard = np.flatnonzero(open_[:, single:])
    open_[hard] = False
    open_[np.arange(len(open_)), lowest] = False
    columns, numbers = np.divmod(np.flatnonzero(open_), bounds.shape[1])
    costs = np.empty(len(columns))
    for start in range(0, len(columns), len(first)):
        some = slice(start, start + len(first))
        costs[some] = tile.pick(columns[some]).costs(numbers[some])
    least = first.copy()
    np.minimum.at(least, columns, costs)
    best = np.where(first == least, lowest, single)
    cheapest = costs == least[columns]
    np.minimum.at(best, columns[cheapest], numbers[cheapest])  # Of equals the first.
    if len(hard):
        best[hard] = _promising(tile.pick(hard), levels, len(_FACTORS))
    return best


def _falling(tile: _Tile) -> _Indices:
    """The cheapest factor of each column, all tried in falling order until no other can win."""
    total, columns = len(_FACTORS), np.arange(len(tile.weights))
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
