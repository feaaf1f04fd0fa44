"""Tiles of a weight's columns, rounded by the workers of a cluster.

The problem (the factor of H, with GPTAQ or Qronos a matrix of the drift, and the weight) lies on storage that all
share while its tiles are rounded; over the network come the integers, their scales and zero points.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.distributed.cluster import BYTES, FLOPS, Cluster
from quarot_onnx.distributed.worker import kept
from quarot_onnx.rounding.factor import Factors
from quarot_onnx.rounding.recursion import Problem
from quarot_onnx.rounding.solve import Tile
from quarot_onnx.rounding.tiles import floats
from quarot_onnx.threads import thread_count

_PASSES = 5
"""Of the factor over a column: with three scales, and a correction or a second term."""

Work = Callable[[NDArray[np.floating], Problem], Tile]


@dataclass(frozen=True)
class _Task:
    """A tile.

    Attributes:
        folder: Where the problem lies.
        start: Its first column.
        stop: The one behind its last.
        work: What is done to it.
    """

    folder: Path
    start: int
    stop: int
    work: Work


class Workers:
    """Those of a cluster, for one weight after the other."""

    def __init__(self, cluster: Cluster, scratch: Path) -> None:
        """Use a cluster, and a folder on storage that all share."""
        self._cluster, self._scratch = cluster, scratch.absolute()

    def help(self, weight: NDArray[np.floating], problem: Problem, tiles: Sequence[slice]) -> bool:
        """Whether they are faster, roughly, than the threads of this process."""
        return pays(weight.shape, _matrices(problem), len(tiles), self._cluster.threads, thread_count())

    def rounded(
        self, weight: NDArray[np.floating], problem: Problem, tiles: Sequence[slice], work: Work
    ) -> Iterator[Tile]:
        """What ``work`` makes of each tile, in their order; ClusterError where the workers cannot do it."""
        folder = self._scratch / f"rounding-{uuid4().hex}"
        folder.mkdir(parents=True)
        try:
            _write(folder, weight, problem)
            tasks = (_Task(folder, columns.start, columns.stop, work) for columns in tiles)
            yield from self._cluster.in_order(_round, tasks)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def pays(shape: tuple[int, ...], matrices: int, tiles: int, theirs: int, ours: int) -> bool:
    """Whether workers are faster, roughly.

    Args:
        shape: Of the weight, [in, out].
        matrices: [in, in] that they read.
        tiles: Of columns.
        theirs: Threads of all workers.
        ours: Threads of this process.
    """
    inputs, outputs = shape
    seconds = _PASSES * inputs**2 * outputs / FLOPS
    moved = 2 * 8 * matrices * inputs**2 + 9 * inputs * outputs
    return moved / BYTES + seconds / min(tiles, theirs) < seconds / min(tiles, ours)


def _matrices(problem: Problem) -> int:
    return 1 + (problem.drift is not None and problem.alpha is not None) + (problem.carried is not None)


def _write(folder: Path, weight: NDArray[np.floating], problem: Problem) -> None:
    arrays = {
        "weight": weight if weight.dtype in {np.float16, np.float64} else floats(weight),
        "order": problem.order,
        "inverse": problem.factors.inverse,
        "first": problem.factors.first,
        "damping": np.float64(problem.factors.damping),
        "drift": None if problem.alpha is None else problem.drift,
        "carried": problem.carried,
        "alpha": None if problem.alpha is None else np.float64(problem.alpha),
    }
    for name, array in arrays.items():
        if array is not None:
            np.save(folder / f"{name}.npy", array)


def _read(folder: Path) -> tuple[NDArray[np.floating], Problem]:
    """What was written, as it lies on storage."""
    found = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
    alpha = None if "alpha" not in found else float(found["alpha"])
    factors = Factors(found["inverse"], found["first"], float(found["damping"]))
    return found["weight"], Problem(found["order"], factors, found.get("drift"), found.get("carried"), alpha)


def _round(task: _Task) -> Tile:
    weight, problem = kept("rounding", task.folder, lambda: _read(task.folder))
    return task.work(weight[:, task.start : task.stop], problem)
