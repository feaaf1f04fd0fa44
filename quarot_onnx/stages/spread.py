"""A runner whose units of samples are taken through the stages by the workers of a cluster.

Hidden states lie on storage that all share; over the network come the products of each unit (half of X̃ᵀX̃, and all of
the drift where it is wanted), which are summed here in the order of the units, as they are where nothing is spread.
Where there are many units, or wide ones, workers sum instead, each some panels of features over all units in that
order. Both give the same bits, whatever the number of workers and whichever of them are lost. What a segment left is
removed once all units are through the last segment that reads it, and not before.
"""

import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from uuid import uuid4

import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.hessian import PANEL, ROWS, Accumulator, Statistics
from quarot_onnx.distributed.cluster import BYTES, FLOPS, Cluster
from quarot_onnx.piecewise.states import Key, read_archive, read_entry, write_archive
from quarot_onnx.stages.blocks import Segments, Stage
from quarot_onnx.stages.passing import Fake, Material, Replacement, Step
from quarot_onnx.stages.runner import FLOAT, QUANTIZED, saved
from quarot_onnx.stages.shared_states import FEEDS, Plan
from quarot_onnx.stages.unit import PanelTask, UnitTask, graph_digest, sum_panels, take_unit
from quarot_onnx.threads import panels


class SpreadRunner:
    """A runner on the workers of a cluster."""

    def __init__(
        self,
        cluster: Cluster,
        file: Path,
        model: ir.Model,
        stages: Sequence[Stage],
        samples: Sequence[Feeds],
        *,
        follow_float: bool,
        scratch: Path,
    ) -> None:
        """Put the samples where the workers find them; nothing is run yet.

        Args:
            cluster: The workers.
            file: The float model's file.
            model: What was loaded of it; it is not changed.
            stages: From ``blocks.find_stages``.
            samples: Input name to array, for each sample. What their mask hides is not summed up.
            follow_float: Whether the float path is needed too (for the drift D).
            scratch: A folder on storage that all workers share.

        Raises:
            CalibrationError: A sample does not name the model's inputs, or the mask hides all of them.
        """
        self._cluster, self._stages = cluster, stages
        self._material = Material.of(model, samples)
        self._segments = Segments(model, stages, self._material.fed)
        places = {node: place for place, node in enumerate(model.graph)}
        self._plan = Plan(
            uuid4().hex,
            file.absolute(),
            graph_digest(model),
            tuple((tuple(places[linear.node] for linear in stage.linears), stage.block) for stage in stages),
            self._material.fed,
            follow_float,
            (scratch / "units").absolute(),
        )
        self._live = set[int]()
        for number, unit in enumerate(self._material.units):
            self._plan.unit(number).mkdir(parents=True)
            feeds = ((place, self._material.samples[place].feeds) for place in unit)
            arrays = (((place, name), array) for place, given in feeds for name, array in given.items())
            write_archive(self._plan.unit(number) / FEEDS, arrays)

    def statistics(self, number: int, before: Replacement | None, activation: Fake | None) -> Statistics:
        """See ``runner.Runner``; ClusterError where the workers cannot do it."""
        step = Step(number, before, activation, self._plan.follow_float)
        width = self._stages[number].linears[0].in_features
        sums = Accumulator(width, drift=self._plan.follow_float)
        wide = self._panels(width)
        for found in self._cluster.in_order(take_unit, self._tasks(step, summing=not wide)):
            sums.add_products(found.products, found.tokens)
        every = tuple(self._tasks(step, summing=False)) if wide else ()
        for part in self._cluster.in_order(sum_panels, (PanelTask(every, places) for places in wide)):
            sums.add_panels(part)
        if self._segments.leaves(number):
            self._live.add(number)
        for segment in self._segments.outlived(number) & self._live:
            self._live.discard(segment)
            for path in self._files(segment):
                path.unlink(missing_ok=True)
        return sums.finish()

    def save(self, folder: Path) -> None:
        """See ``runner.Runner``: the files as they are, which nobody changes any more, by another name."""
        for segment in sorted(self._live):
            for path in self._files(segment):
                _linked(path, folder / f"{path.stem}-{path.parent.name}.zip")

    def load(self, folder: Path) -> None:
        """See ``runner.Runner``."""
        unit_of = {place: number for number, unit in enumerate(self._material.units) for place in unit}
        origins = self._segments.origins
        for path in self._paths:
            parts: dict[tuple[int, int], list[tuple[Path, Key]]] = {}
            for archive in saved(folder, path):
                for (place, name), _ in read_archive(archive):
                    parts.setdefault((unit_of[place], origins[name]), []).append((archive, (place, name)))
            for (unit, segment), entries in parts.items():
                write_archive(self._plan.states(unit, path, segment), _arrays(entries))
                self._live.add(segment)

    @property
    def _paths(self) -> tuple[str, ...]:
        return (QUANTIZED, FLOAT) if self._plan.follow_float else (QUANTIZED,)

    def _files(self, segment: int) -> Iterator[Path]:
        """What a segment left of all units, on all paths."""
        for unit in range(len(self._material.units)):
            for path in self._paths:
                yield self._plan.states(unit, path, segment)

    def _panels(self, width: int) -> list[tuple[int, ...]]:
        """The panels of each task where sums are made so, which is for the better where they are wide; else nothing."""
        count, threads = len(panels(width, PANEL)), self._cluster.threads
        if not by_panels(width, len(self._material.units), follow_float=self._plan.follow_float, threads=threads):
            return []
        tasks = min(count, threads)
        return [tuple(range(first, count, tasks)) for first in range(tasks)]

    def _tasks(self, step: Step, *, summing: bool = True) -> Iterator[UnitTask]:
        for number, unit in enumerate(self._material.units):
            samples = [self._material.samples[place] for place in unit]
            yield UnitTask(
                self._plan,
                step,
                number,
                unit.start,
                tuple(sample.number for sample in samples),
                tuple(sample.visible for sample in samples),
                summing,
            )


def by_panels(width: int, units: int, follow_float: bool, threads: int) -> bool:
    """Whether sums are made panel by panel, from hidden states that are read once more, and not unit by unit.

    Either way gives the same bits. Products go over the network for each unit, sums of a panel once; but each who sums
    panels reads all rows, and there may be fewer panels than threads. What counts is seconds, roughly: those of the
    network where sums arrive, of storage where rows are read, and of products.

    Args:
        width: The stage's inputs.
        units: Of samples.
        follow_float: Whether D is wanted, too.
        threads: Of the workers.
    """
    matrices, paths = (3, 2) if follow_float else (1, 1)
    flops = 1.0 * units * ROWS * width**2 * matrices / FLOPS
    by_units = 2.0 * units * width**2 * matrices / BYTES + flops / min(units, threads)
    read = 4.0 * units * ROWS * width * paths
    summed = (4.0 * width**2 * matrices + read) / BYTES + flops / min(len(panels(width, PANEL)), threads)
    return summed < by_units


def _arrays(entries: Sequence[tuple[Path, Key]]) -> Iterator[tuple[Key, NDArray[Any]]]:
    """Arrays out of several archives, one in memory at a time."""
    for archive, group in groupby(entries, key=lambda entry: entry[0]):
        with zipfile.ZipFile(archive) as opened:
            for _, key in group:
                yield key, read_entry(opened, key)


def _linked(path: Path, name: Path) -> None:
    """Give a file another name, or copy it where the disk knows no such thing."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)
