"""Rounding one input row after the other, what each row does wrong being made good by those to come.

With U the upper Cholesky factor of the inverse Hessian, row i of W: [in, out] is rounded to q_i and

    e = w_i - q_i,    w_{>i} ← w_{>i} - (U_{i,>i} / U_ii) e  (+ w_i P_{i,>i})

(GPTQ, Frantar et al. 2022, equations 2, 3 and section 3.3; the term in P is GPTAQ's, Li et al. 2025). The paper's rows
are our columns: each is a problem of its own. The updates are lazy, on two levels: inside a strip of a few rows each
row collects what it is owed when its turn comes; a strip gets what the rest of its block owes it in one matrix product,
and so do the rows after the block. All in float64.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.config.rounding import HessianConfig
from quarot_onnx.quantization.grids import Grid, Integers
from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.rounding.factor import Factors
from quarot_onnx.rounding.grids import Steps, find_grid

_STRIP, _PIECE = 16, 64
"""Rows of a strip, and of a piece of what is updated after a block: they stay in a core's cache."""

_Due = tuple[NDArray[np.float64], NDArray[np.float64]]
"""A row takes up its row of the first matrix times the second, whose rows have had their turn."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A Linear's statistics in the order in which its inputs are rounded.

    Attributes:
        order: Input feature of each step, [in].
        factors: Of the damped Hessian, in that order.
        drift: D in that order, [in, in]; None where it was not recorded, or nothing more is to be had of it.
        carried: GPTAQ's P, strictly upper triangular [in, in] in that order, or None.
        alpha: The part of Qronos' correction that is made; None for other methods.
    """

    order: NDArray[np.intp]
    factors: Factors
    drift: NDArray[np.float64] | None
    carried: NDArray[np.float64] | None = None
    alpha: float | None = None


def moving(scheme: WeightScheme, options: HessianConfig) -> bool:
    """Whether groups' grids are found on the way."""
    return scheme.group_size is not None and not options.static_groups


@dataclass(frozen=True, eq=False)
class Recursion:
    """Some columns of W on their way; all arrays but those of ``problem`` are views that are written to.

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

    def round(self) -> NDArray[np.float64]:
        """Block after block; gives what each column costs, [columns]."""
        costs = np.zeros(self.rows.shape[1])
        turns, size = moving(self.scheme, self.options), self.scheme.group_size or len(self.rows)
        starts = set(range(0, len(self.rows), self.options.block_size))
        if turns:  # A group's first row must find W up to date: it begins a block.
            starts |= set(range(0, len(self.rows), size))
        stops = [*sorted(starts), len(self.rows)]
        for start, stop in pairwise(stops):
            if turns and start % size == 0:
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
        if self.problem.carried is not None:
            dues.append((self.problem.carried[block, start:].T, rows))
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
