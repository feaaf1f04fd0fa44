"""Weights rounded to nearest when they are written: read once, and computed on their way into the output.

A graph holds such a weight as several tensors: integers, scales, zero points. They are written one after the other, so
the grid is kept for those that follow the integers: a small one for good; of large ones, with a scale for every group,
the latest.
"""

from dataclasses import dataclass

from quarot_onnx.quantization.grids import Grid
from quarot_onnx.quantization.scheme import QuantizedWeight
from quarot_onnx.rounding.blockwise import WeightJob
from quarot_onnx.rounding.grids import find_grid
from quarot_onnx.rounding.rtn import nearest_integers, round_to_nearest_weight
from quarot_onnx.rounding.store import RoundedWeight

_SMALL = 1 << 18
"""Bytes of scales that are kept for good."""


@dataclass(eq=False)
class _Found:
    """A weight's grid, once it is known and as long as it is kept."""

    grid: Grid | None = None


class PlainWeights:
    """The weights of a run that are rounded to nearest."""

    def __init__(self, *, clip: bool) -> None:
        """Nothing is read yet.

        Args:
            clip: Whether to search how far to shrink the ranges.
        """
        self._clip = clip
        self._latest = _Found()

    def rounded(self, job: WeightJob) -> RoundedWeight:
        """A weight; reading it raises ModelError where it holds NaN or infinity."""
        found = _Found()

        def grid() -> Grid:
            return found.grid or self._keep(
                found, find_grid(job.read(own=False), job.scheme, job.name, clip=self._clip)
            )

        def load() -> QuantizedWeight:
            weight, kept = job.read(own=False), found.grid
            if kept is not None:
                integers = nearest_integers(weight, job.scheme, kept)
                return QuantizedWeight(job.scheme, integers, kept.scale, kept.zero_point)
            rounded = round_to_nearest_weight(weight, job.scheme, job.name, clip=self._clip)
            self._keep(found, Grid(rounded.scale, rounded.zero_point))
            return rounded

        rows, columns = job.weight.shape
        return RoundedWeight(job.scheme, (rows, columns), grid, load)

    def _keep(self, found: _Found, grid: Grid) -> Grid:
        found.grid = grid
        if grid.scale.nbytes > _SMALL:
            self._latest.grid, self._latest = None, found
        return grid
