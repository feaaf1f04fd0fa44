"""What every shrink factor costs a column at least: all bounds from one histogram and one matrix product.

The cost of an element x = w / s with the factor p is f_p(x) = d^2.4, d its distance to the nearest of the points p·j,
j in [low, high]. On nodes x_k with spacing δ, write x = (1 - λ) x_k + λ x_(k+1) and

    g_p(x_k) = f_p(x_k) - 2.4 · 1.4 · δ²/8 · (d_k + 2δ)^0.4

Then (1 - λ) g_p(x_k) + λ g_p(x_(k+1)) <= f_p(x). For f_p is the least of convex functions, one for each point p·j. The
one of the point nearest to x is at x below its own chord by δ²/8 times its largest second derivative at most, its chord
is nowhere below that of f_p, and neither node is farther from its point than d_k + 2δ. So

    bounds [columns, factors] = H [columns, nodes] · g [nodes, factors]

where H sums (1 - λ) and λ at the nodes. Most factors need no column of g: all those below a factor p cost at least the
d^2.4 of the distance d to the range [p·low, p·high], which is convex in x and grows as p falls. So one column of g
bounds all of them.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.threads import Scratch

_NOISE = 2.0**-20
"""What float32 may add to the cost of an element within the range, here and in the search, for each integer."""

_DENSITY = 16.0
"""Nodes for each integer where as many weights share them; more pay with the third root of the weights, as what they
cost grows with their number and the costs left open fall with its square."""

_MULTIPLE = 32
"""Of what the number of nodes is a multiple."""

_FEW = 1024
"""So many shares at most are summed in float32: each puts a sum off by 2^-24 of it at most."""

_scratch = Scratch()


@dataclass(frozen=True)
class Family:
    """Grids and factors that bounds are asked for.

    Attributes:
        levels: The number of integers.
        factors: The shrink factors in falling order.
        norm: The power of an error, 2 or more.
        single: So many factors are bounded one by one, the others together.
    """

    levels: int
    factors: tuple[float, ...]
    norm: float
    single: int

    def density(self, nodes: int) -> float:
        """Nodes for each integer: rounded zero points leave weights half a step outside, and one node is to spare."""
        return (nodes - 3) / self.levels


def cost_bounds(
    weights: NDArray[np.float32], per_step: NDArray[np.float64], low: NDArray[np.float32], family: Family
) -> NDArray[np.float32]:
    """Bound what factors cost.

    Args:
        weights: [columns, rows]; in steps none is beyond its column's limits by more than a half.
        per_step: What a weight is multiplied by to be in steps of its column's scale, [columns].
        low: The smallest integer of each column, [columns]; fast where equal ones are neighbours.
        family: The grids and the factors.

    Returns:
        At most Σ over the rows of |x - p·j|^norm for the single factors, then for all others, if there are any:
        [columns, single factors and perhaps one]; a relative error of 1e-4 is to be allowed for.
    """
    nodes = _node_count(weights.shape[1], family.levels)
    density = family.density(nodes)
    shares = _shares(weights, per_step * density, 1.0 + density * (0.5 - low), nodes)
    ends = [0, *(np.flatnonzero(low[1:] != low[:-1]) + 1).tolist(), len(low)]
    tables = (_table(int(low[start]), nodes, family) for start in ends[:-1])
    bounds = [shares[start:stop] @ table for (start, stop), table in zip(pairwise(ends), tables, strict=True)]
    return bounds[0] if len(bounds) == 1 else np.concatenate(bounds)


def _node_count(rows: int, levels: int) -> int:
    wanted: float = _DENSITY * levels * max(1.0, rows / levels) ** (1.0 / 3.0)
    return max(1, round(wanted / _MULTIPLE)) * _MULTIPLE


def _shares(
    weights: NDArray[np.float32], per_node: NDArray[np.float64], first: NDArray[np.floating], nodes: int
) -> NDArray[np.float32]:
    """The share of every node in every column, [columns, nodes]; held by this thread's scratch.

    Args:
        weights: [columns, rows].
        per_node: What a weight is multiplied by to be in units of the nodes' spacing, [columns].
        first: How many nodes 0 is behind the first one, [columns].
        nodes: How many there are.
    """
    columns, rows = weights.shape
    right, left = _scratch.array("shares", (2, columns, rows), np.float32)
    cell, cells = (_scratch.array(f"cells {of}", (columns, rows), of) for of in ("int32", "intp"))
    np.multiply(weights, per_node.astype(np.float32)[:, None], out=right)
    np.add(right, _one_of(first.astype(np.float32)), out=right)
    np.copyto(cell, np.floor(right, out=left), casting="unsafe")
    np.copyto(cells, np.add(cell, _first_cells(columns, rows, nodes), out=cell))
    np.subtract(right, left, out=right)
    np.subtract(np.float32(1.0), right, out=left)
    total = np.float32 if rows <= _FEW else np.float64
    sums = _scratch.array("sums", (columns * nodes,), total)
    sums.fill(0.0)
    np.add.at(sums, cells.reshape(-1), left.reshape(-1).astype(total, copy=False))
    np.add.at(sums[1:], cells.reshape(-1), right.reshape(-1).astype(total, copy=False))
    return sums.astype(np.float32, copy=False).reshape(columns, nodes)


def _one_of(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values of columns to add to them: one for all if they are the same."""
    return values[:1] if (values == values[0]).all() else values[:, None]


@lru_cache(maxsize=4)
def _first_cells(columns: int, rows: int, nodes: int) -> NDArray[np.int32]:
    """The number of each column's first cell, as often as it has rows."""
    return np.repeat(np.arange(columns, dtype=np.int32) * np.int32(nodes), rows).reshape(columns, rows)


@lru_cache(maxsize=64)
def _table(low: int, nodes: int, family: Family) -> NDArray[np.float32]:
    """The g of every node, less what rounding may hide, for the single factors and all others: [nodes, factors].

    What all others cost is what is beyond the range of the first of them.
    """
    shrink, spacing = np.array(family.factors), 1.0 / family.density(nodes)
    values = low - 0.5 + spacing * np.arange(-1, nodes - 1)[:, None]
    single, other = shrink[: family.single], shrink[family.single : family.single + 1]
    high = low + family.levels - 1
    nearest = single * np.clip(np.rint(values / single), low, high)
    within = np.clip(values, other * low, other * high)
    distance = np.abs(values - np.concatenate([nearest, within], axis=1))
    bend = family.norm * (family.norm - 1.0) * (distance + 2.0 * spacing) ** (family.norm - 2.0)
    return np.asarray(distance**family.norm - bend * spacing**2 / 8.0 - family.levels * _NOISE, np.float32)
