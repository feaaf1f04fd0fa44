"""What every shrink factor costs a column at least: all bounds from one histogram and one matrix product.

The cost of an element x = w / s with the factor p is f_p(x) = d^2.4, d its distance to the nearest of the points p·j,
j in [low, high]. On nodes x_k with spacing δ, write x = (1 - λ) x_k + λ x_(k+1) and

    g_p(x_k) = f_p(x_k) - 2.4 · 1.4 · δ²/8 · (d_k + 2δ)^0.4

Then (1 - λ) g_p(x_k) + λ g_p(x_(k+1)) <= f_p(x). For f_p is the least of convex functions, one for each point p·j. The
one of the point nearest to x is at x below its own chord by δ²/8 times its largest second derivative at most, its chord
is nowhere below that of f_p, and neither node is farther from its point than d_k + 2δ. So

    bounds [columns, factors] = H [columns, nodes] · g [nodes, factors]

where H sums (1 - λ) and λ at the nodes.
"""

from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_NOISE = 2.0**-20
"""What float32 may add to the cost of an element within the range, here and in the search, for each integer."""

_DENSITY = 12.0
"""Nodes for each integer where as many weights share them; more pay with the third root of the weights, as what they
cost grows with their number and the costs left open fall with its square."""

_ROWS, _INNER = 48, 64
"""Products of so many columns and nodes at a time OpenBLAS computes in the calling thread, however many it has: its
own threads would fight for the cores with the caller's."""


def cost_bounds(
    tile: NDArray[np.float32],
    low: NDArray[np.float32],
    levels: int,
    factors: tuple[float, ...],
    norm: float,
) -> NDArray[np.float32]:
    """Bound what factors cost.

    Args:
        tile: Weights in units of the scale, [columns, rows]; none is beyond its column's limits by more than a half.
        low: The smallest integer of each column, [columns]; fast where equal ones are neighbours.
        levels: The number of integers, the same for all columns.
        factors: The shrink factors.
        norm: The power of an error, 2 or more.

    Returns:
        At most Σ over the rows of |x - p·j|^norm, [columns, factors]; a relative error of 1e-4 is to be allowed for.
    """
    columns, rows = tile.shape
    nodes = _node_count(rows, levels)
    histogram = _histogram(tile, low, levels, nodes)
    bounds = np.empty((columns, len(factors)), np.float32)
    ends = [0, *(np.flatnonzero(np.diff(low)) + 1).tolist(), columns]
    for start, stop in pairwise(ends):
        table = _table(int(low[start]), levels, nodes, factors, norm)
        _multiply(histogram[start:stop], table, bounds[start:stop])
    return bounds


def _node_count(rows: int, levels: int) -> int:
    wanted: float = _DENSITY * levels * max(1.0, rows / levels) ** (1.0 / 3.0)
    return max(1, round(wanted / _INNER)) * _INNER


def _density(levels: int, nodes: int) -> float:
    """Nodes for each integer: rounded zero points leave weights half a step beyond the limits, and one is to spare."""
    return (nodes - 3) / levels


def _histogram(tile: NDArray[np.float32], low: NDArray[np.float32], levels: int, nodes: int) -> NDArray[np.float32]:
    """The share of every node in every column, [columns, nodes]."""
    columns, density = len(tile), _density(levels, nodes)
    place = tile * np.float32(density)
    place += (1.0 + density * (0.5 - low[:, None])).astype(np.float32)
    left = np.floor(place)
    place -= left
    cell = left.astype(np.intp)
    cell += np.arange(columns)[:, None] * nodes
    cells = cell.ravel()
    right = np.bincount(cells, place.ravel(), columns * nodes)
    shares = np.bincount(cells, None, columns * nodes) - right
    shares[1:] += right[:-1]
    return shares.astype(np.float32).reshape(columns, nodes)


def _multiply(histogram: NDArray[np.float32], table: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Their product, piece by piece."""
    inner, width = len(table) // _INNER, table.shape[1]
    stacked = table.reshape(inner, _INNER, width)
    whole = len(histogram) // _ROWS * _ROWS
    for start, stop, rows in ((0, whole, _ROWS), (whole, len(histogram), len(histogram) - whole)):
        if stop > start:
            left = histogram[start:stop].reshape(-1, rows, inner, _INNER).swapaxes(1, 2)
            out[start:stop] = (left @ stacked).sum(axis=1).reshape(-1, width)


@lru_cache(maxsize=64)
def _table(low: int, levels: int, nodes: int, factors: tuple[float, ...], norm: float) -> NDArray[np.float32]:
    """The g of every node and factor, less what rounding may hide: [nodes, factors]."""
    shrink, spacing = np.array(factors), 1.0 / _density(levels, nodes)
    values = low - 0.5 + spacing * np.arange(-1, nodes - 1)[:, None]
    distance = np.abs(values - shrink * np.clip(np.rint(values / shrink), low, low + levels - 1))
    bend = norm * (norm - 1.0) * (distance + 2.0 * spacing) ** (norm - 2.0)
    return np.asarray(distance**norm - bend * spacing**2 / 8.0 - levels * _NOISE, np.float32)
