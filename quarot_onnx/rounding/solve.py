"""Rounding one input row after the other, what each row does wrong being made good by those to come.

With U the upper Cholesky factor of the inverse Hessian, row i of W: [in, out] is rounded to q_i and

    e = w_i - q_i,    w_{>i} ← w_{>i} - (U_{i,>i} / U_ii) e  (+ w_i P_{i,>i})

(GPTQ, Frantar et al. 2022, equations 2, 3 and section 3.3; the term in P is GPTAQ's, Li et al. 2025). The paper's rows
are our columns: each is a problem of its own. The updates are lazy, on two levels: inside a strip of a few rows each
row collects what it is owed when its turn comes; a strip gets what the rest of its block owes it in one matrix product,
and so do the rows after the block. All in float64, in tiles of columns, side by side.

With the clip search on, a column is rounded with some multiples of the scale that the search finds, and keeps the one
whose own errors are least in the end: Σ_i (e_i / U_ii)² is (w - q)ᵀ(H + λI)(w - q), what the search, which knows no H,
is a guess at.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.calibration.hessian import Statistics
from quarot_onnx.config.rounding import HessianConfig
from quarot_onnx.errors import CalibrationError, ConfigError
from quarot_onnx.quantization.grids import Grid, Integers
from quarot_onnx.quantization.scheme import QuantizedWeight, WeightScheme
from quarot_onnx.rounding.factor import Factors, factorise
from quarot_onnx.rounding.grids import Steps, find_grid
from quarot_onnx.threads import spread

_TILE = 768
"""Columns of W worked on together, at most: bounds the memory of the float64 copies."""

_STRIP, _PIECE = 16, 64
"""Rows of a strip, and of a piece of what is updated after a block: they stay in a core's cache."""

MULTIPLES = (1.0, 0.95, 0.9)
"""Of the scale that the clip search finds: what a column is rounded with, one after the other; of equals the first."""

_Due = tuple[NDArray[np.float64], NDArray[np.float64]]
"""A row takes up its row of the first matrix times the second, whose rows have had their turn."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """What a method gives.

    Attributes:
        weight: The integers and their grid.
        damping: λ as a fraction of the mean diagonal element of H, as finally used: larger than asked for where H could
            not be factorised otherwise, and 0 for methods without H.
    """

    weight: QuantizedWeight
    damping: float


@dataclass(frozen=True, eq=False)
class Problem:
    """A Linear's statistics in the order in which its inputs are rounded.

    Attributes:
        order: Input feature of each step, [in].
        factors: Of the damped Hessian, in that order.
        drift: D in that order, [in, in]; None where it was not recorded.
    """

    order: NDArray[np.intp]
    factors: Factors
    drift: NDArray[np.float64] | None


def pose(statistics: Statistics, scheme: WeightScheme, options: HessianConfig, name: str) -> Problem:
    """Order, damp and factorise the statistics.

    Args:
        statistics: H and D of the Linear's inputs.
        scheme: The family of grids.
        options: Damping and order.
        name: The Linear, for messages.

    Raises:
        ConfigError: act-order with groups whose grids are not static.
        CalibrationError: The statistics hold NaN or infinity, or H cannot be factorised.
    """
    if options.act_order and scheme.group_size is not None and not options.static_groups:
        raise ConfigError(
            f"act_order with group_size {scheme.group_size} would take the inputs of {name!r} out of their groups; "
            "turn static_groups on, or act_order off"
        )
    hessian, drift = statistics.hessian, statistics.drift
    if not np.isfinite(hessian).all() or (drift is not None and not np.isfinite(drift).all()):
        raise CalibrationError(
            f"the calibration inputs of {name!r} hold NaN or infinity; check the calibration data, or exclude the node"
        )
    order = np.arange(len(hessian))
    if options.act_order:
        order = np.argsort(-np.diagonal(hessian), kind="stable")
        hessian = hessian[np.ix_(order, order)]
        drift = None if drift is None else drift[np.ix_(order, order)]
    return Problem(order, factorise(hessian, options.perc_damp, name), drift)


def round_in_order(
    weight: NDArray[np.floating],
    problem: Problem,
    scheme: WeightScheme,
    options: HessianConfig,
    name: str,
    *,
    carried: NDArray[np.float64] | None = None,
) -> Rounded:
    """Round all rows.

    Args:
        weight: W: [in, out], its rows in the inputs' own order.
        problem: The statistics.
        scheme: The family of grids.
        options: Block size, groups and clip search.
        name: The Linear, for messages.
        carried: P, strictly upper triangular [in, in] in the problem's order, or None.

    Returns:
        The integers, their grid, and the damping.

    Raises:
        ModelError: The weight holds NaN or infinity.
    """
    grid = find_grid(weight, scheme, name, clip=_early_clip(scheme, options))
    integers = np.empty(weight.shape, scheme.dtype)
    multiples = MULTIPLES if _searched(scheme, options) else MULTIPLES[:1]

    def round_tile(columns: slice) -> None:
        part = Grid(grid.scale[:, columns], grid.zero_point[:, columns]) if scheme.per_channel else grid
        exact = weight[problem.order, columns].astype(np.float64)
        if len(multiples) == 1:
            _Tile(exact, integers[:, columns], part, problem, scheme, options, name, carried).round()
            return
        found, tried = part.scale.copy(), np.empty(exact.shape, scheme.dtype)
        least = np.full(exact.shape[1], np.inf)
        for number, multiple in enumerate(multiples):
            scale = np.maximum((found * multiple).astype(np.float32), np.finfo(np.float32).tiny)
            other = Grid(scale, part.zero_point)
            costs = _Tile(exact.copy(), tried, other, problem, scheme, options, name, carried).round()
            better = (costs < least) | (number == 0)  # also where a cost is beyond all numbers
            least[better] = costs[better]
            part.scale[:, better] = scale[:, better]
            integers[:, columns][:, better] = tried[:, better]

    spread(round_tile, column_tiles(weight.shape[1], _TILE))
    return Rounded(QuantizedWeight(scheme, integers, grid.scale, grid.zero_point), problem.factors.damping)


def column_tiles(width: int, most: int) -> list[slice]:
    """All columns, in tiles of nearly the same width, at most ``most``."""
    count = max(1, -(-width // most))
    size = max(1, -(-width // count))
    return [slice(left, min(left + size, width)) for left in range(0, width, size)]


def _moving(scheme: WeightScheme, options: HessianConfig) -> bool:
    """Whether groups' grids are found on the way."""
    return scheme.group_size is not None and not options.static_groups


def _early_clip(scheme: WeightScheme, options: HessianConfig) -> bool:
    """The search that is worth its time before the first row."""
    return options.mse and not _moving(scheme, options)


def _searched(scheme: WeightScheme, options: HessianConfig) -> bool:
    """Whether scales are chosen by what rounding with them costs."""
    return _early_clip(scheme, options) and scheme.per_channel and scheme.bits < 8


@dataclass(frozen=True, eq=False)
class _Tile:
    """Some columns of W on their way; all arrays but ``problem`` and ``carried`` are views that are written to.

    Attributes:
        rows: W in the problem's order, float64 [in, columns]; a row is what was rounded once its turn has come.
        integers: [in, columns], in the inputs' own order.
        grid: Of these columns.
    """

    rows: NDArray[np.float64]
    integers: Integers
    grid: Grid
    problem: Problem
    scheme: WeightScheme
    options: HessianConfig
    name: str
    carried: NDArray[np.float64] | None

    def round(self) -> NDArray[np.float64]:
        """Block after block; gives what each column costs, [columns]."""
        costs = np.zeros(self.rows.shape[1])
        moving, size = _moving(self.scheme, self.options), self.scheme.group_size or len(self.rows)
        starts = set(range(0, len(self.rows), self.options.block_size))
        if moving:  # A group's first row must find W up to date: it begins a block.
            starts |= set(range(0, len(self.rows), size))
        stops = [*sorted(starts), len(self.rows)]
        for start, stop in pairwise(stops):
            if moving and start % size == 0:
                self._find_group(start // size, self.rows[start : start + size])
            costs += self._block(start, stop)
        return costs

    def _find_group(self, group: int, rows: NDArray[np.float64]) -> None:
        """Set the grid of a group from its rows as they are now."""
        whole = WeightScheme(self.scheme.bits, symmetric=self.scheme.symmetric, signed=self.scheme.signed)
        grid = find_grid(rows, whole, self.name, clip=self.options.mse)
        self.grid.scale[group], self.grid.zero_point[group] = grid.scale[0], grid.zero_point[0]

    def _block(self, start: int, stop: int) -> NDArray[np.float64]:
        """Round the rows of a block and pass their errors on to those after it; gives what these cost the columns."""
        rows, block = self.rows[start:stop], slice(start, stop)
        errors = np.empty_like(rows)
        inverse = self.problem.factors.inverse
        dues = [((inverse[block, start:] / -np.diagonal(inverse)[block, None]).T, errors)]
        if self.carried is not None:
            dues.append((self.carried[block, start:].T, rows))
        steps = Steps.of(self.grid, self.scheme)
        for top in range(0, len(rows), _STRIP):
            strip = slice(top, min(top + _STRIP, len(rows)))
            for share, source in dues:
                rows[strip] += share[strip, :top] @ source[:top]
            own = [(np.ascontiguousarray(share[strip, strip]), source[strip]) for share, source in dues]
            self._strip(start + top, rows[strip], errors[strip], own, steps)
        for top in range(stop, len(self.rows), _PIECE):
            piece = slice(top, top + _PIECE)
            for share, source in dues:
                self.rows[piece] += share[top - start : top - start + _PIECE] @ source
        costs: NDArray[np.float64] = np.square(errors / np.diagonal(inverse)[block, None]).sum(axis=0)
        return costs

    def _strip(
        self, first: int, rows: NDArray[np.float64], errors: NDArray[np.float64], dues: list[_Due], steps: Steps
    ) -> None:
        """Round the rows of a strip, the first of which is row ``first``, and note their errors."""
        levels = np.empty_like(rows)
        features = self.problem.order[first : first + len(rows)]
        groups = features // (self.scheme.group_size or len(self.rows))
        for step, group in enumerate(groups.tolist()):
            row, level, error, scale = rows[step], levels[step], errors[step], steps.scale[group]
            if step:
                for share, source in dues:
                    row += share[step, :step] @ source[:step]
            np.divide(row, scale, out=level)
            np.rint(level, out=level)
            np.maximum(level, steps.low[group], out=level)
            np.minimum(level, steps.high[group], out=level)
            np.multiply(level, scale, out=error)
            np.subtract(row, error, out=error)
        self.integers[features] = levels + self.grid.zero_point[groups].astype(np.float64)
