"""Rounding one input row after the other, what each row does wrong being made good by those to come.

With U the upper Cholesky factor of the inverse Hessian, row i of W: [in, out] is rounded to q_i and

    e = (w_i - q_i) / U_ii,    w_{>i} ← w_{>i} - U_{i,>i} e  (+ w_i P_{i,>i})

(GPTQ, Frantar et al. 2022, equations 2, 3 and section 3.3; the term in P is GPTAQ's, Li et al. 2025). The paper's rows
are our columns: each is a problem of its own. The updates are lazy: inside a block of rows each row collects what it
is owed when its turn comes; the rows after the block get theirs in one matrix product. All in float64, in tiles of
columns.
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

_TILE = 1024
"""Columns of W worked on together: bounds the memory of the float64 copy."""


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


def pose(
    statistics: Statistics, scheme: WeightScheme, options: HessianConfig, name: str, *, root: bool = False
) -> Problem:
    """Order, damp and factorise the statistics.

    Args:
        statistics: H and D of the Linear's inputs.
        scheme: The family of grids.
        options: Damping and order.
        name: The Linear, for messages.
        root: Whether the factor of H itself is wanted, beside that of its inverse.

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
    return Problem(order, factorise(hessian, options.perc_damp, name, root=root), drift)


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
    for left in range(0, weight.shape[1], _TILE):
        columns = slice(left, left + _TILE)
        wide = scheme.per_channel
        part = Grid(grid.scale[:, columns], grid.zero_point[:, columns]) if wide else grid
        tile = weight[problem.order, columns].astype(np.float64)
        _Tile(tile, integers[:, columns], part, problem, scheme, options, name, carried).round()
    return Rounded(QuantizedWeight(scheme, integers, grid.scale, grid.zero_point), problem.factors.damping)


def _moving(scheme: WeightScheme, options: HessianConfig) -> bool:
    """Whether groups' grids are found on the way."""
    return scheme.group_size is not None and not options.static_groups


def _early_clip(scheme: WeightScheme, options: HessianConfig) -> bool:
    """The search that is worth its time before the first row."""
    return options.mse and not _moving(scheme, options)


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

    def round(self) -> None:
        """Block after block."""
        moving, size = _moving(self.scheme, self.options), self.scheme.group_size or len(self.rows)
        starts = set(range(0, len(self.rows), self.options.block_size))
        if moving:  # A group's first row must find W up to date: it begins a block.
            starts |= set(range(0, len(self.rows), size))
        stops = [*sorted(starts), len(self.rows)]
        for start, stop in pairwise(stops):
            if moving and start % size == 0:
                self._find_group(start // size, self.rows[start : start + size])
            self._block(start, stop)

    def _find_group(self, group: int, rows: NDArray[np.float64]) -> None:
        """Set the grid of a group from its rows as they are now."""
        whole = WeightScheme(self.scheme.bits, symmetric=self.scheme.symmetric, signed=self.scheme.signed)
        grid = find_grid(rows, whole, self.name, clip=self.options.mse)
        self.grid.scale[group], self.grid.zero_point[group] = grid.scale[0], grid.zero_point[0]

    def _block(self, start: int, stop: int) -> None:
        """Round the rows of a block and pass their errors on to those after it."""
        inverse, carried, rows = self.problem.factors.inverse, self.carried, self.rows[start:stop]
        block = slice(start, stop)
        errors = np.empty_like(rows)
        owed = np.ascontiguousarray(inverse[block, block].T)
        gained = None if carried is None else np.ascontiguousarray(carried[block, block].T)
        steps = Steps.of(self.grid, self.scheme)
        zero = self.grid.zero_point.astype(np.float64)
        size = self.scheme.group_size or len(self.rows)
        for step in range(stop - start):
            row = rows[step]
            row -= owed[step, :step] @ errors[:step]
            if gained is not None:
                row += gained[step, :step] @ rows[:step]
            feature = self.problem.order[start + step]
            group = feature // size
            nearest = np.rint(row / steps.scale[group])
            np.clip(nearest, steps.low[group], steps.high[group], out=nearest)
            self.integers[feature] = nearest + zero[group]
            errors[step] = (row - nearest * steps.scale[group]) / owed[step, step]
        self.rows[stop:] -= inverse[block, stop:].T @ errors
        if carried is not None:
            self.rows[stop:] += carried[block, stop:].T @ rows
