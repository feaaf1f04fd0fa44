"""A runner whose units of samples are taken through the stages by the workers of a cluster.

Hidden states lie on storage that all share; over the network come the products of each unit (half of X̃ᵀX̃, and all of
the drift where it is wanted), which are summed here in the order of the units, as they are where nothing is spread: the
same bits, whatever the number of workers and whichever of them are lost. What a segment left is removed once all units
are through the last segment that reads it, and not before.
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
from quarot_onnx.calibration.hessian import Accumulator, Statistics
from quarot_onnx.distributed.cluster import Cluster
from quarot_onnx.piecewise.states import Key, read_archive, read_entry, write_archive
from quarot_onnx.stages.blocks import Segments, Stage
from quarot_onnx.stages.passing import Fake, Material, Replacement, Step
from quarot_onnx.stages.runner import FLOAT, QUANTIZED, saved
from quarot_onnx.stages.unit import FEEDS, Plan, UnitTask, graph_digest, take_unit


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
        sums = Accumulator(self._stages[number].linears[0].in_features, drift=self._plan.follow_float)
        for found in self._cluster.in_order(take_unit, self._tasks(step)):
            sums.add_products(found.products, found.tokens)
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

    def _tasks(self, step: Step) -> Iterator[UnitTask]:
        for number, unit in enumerate(self._material.units):
            samples = [self._material.samples[place] for place in unit]
            yield UnitTask(
                self._plan,
                step,
                number,
                unit.start,
                tuple(sample.number for sample in samples),
                tuple(sample.visible for sample in samples),
            )


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
