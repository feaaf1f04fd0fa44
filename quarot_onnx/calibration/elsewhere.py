"""Samples shown to an observer by the workers of a cluster, which then takes in what each of them saw.

Minima, maxima and counts come out the same however samples are grouped, so each thread gets as large a group as there
is, and opens the model once. Samples lie on storage that all share; what an observer has seen comes back.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, Self
from uuid import uuid4

from numpy.typing import NDArray

from quarot_onnx.calibration.checked import DataReader, wrap
from quarot_onnx.calibration.decoding import decoding_on
from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.observing import Observer, observe_samples
from quarot_onnx.calibration.readers import SampleReader
from quarot_onnx.distributed.cluster import Cluster
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.piecewise.states import Key, read_archive, write_archive
from quarot_onnx.progress import Progress


class Merging(Observer, Protocol):
    """An observer that can take in what another one of its kind saw, in another process."""

    def merge(self, other: Self) -> None:
        """Take in what another one saw."""


@dataclass(frozen=True)
class Shared:
    """The model, as workers run it.

    Attributes:
        file: Its file.
        folder: Where the original's config files lie.
        steps: Decode steps behind every sample.
        memory: Whether it is run piece by piece.
    """

    file: Path
    folder: Path
    steps: int
    memory: Memory


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """Who shows samples, and of which model.

    Attributes:
        cluster: The workers.
        shared: The model.
        scratch: A folder on storage that all share.
    """

    cluster: Cluster
    shared: Shared
    scratch: Path

    def observe(
        self, observer: Merging, reader: DataReader, max_samples: int | None, progress: Progress | None
    ) -> None:
        """Show an observer the samples of a reader; see ``observing.observe_samples``.

        Raises:
            CalibrationError: A reader that is empty or does not fit the model's inputs, or what the observer refuses.
            ClusterError: The workers cannot do it.
        """
        given = wrap(reader)
        samples = list(islice(given, max_samples))
        if not samples:
            raise given.empty()
        done = 0
        blank = deepcopy(observer)  # what is merged into is not what is sent
        size = -(-len(samples) // self.cluster.threads)
        for found in self.cluster.in_order(show_group, self._groups(blank, samples, size, given.name)):
            observer.merge(found.observer)
            done += found.samples
            if progress is not None:
                progress(done, len(samples))

    def _groups(self, observer: Merging, samples: Sequence[Feeds], size: int, name: str) -> Iterator["Group"]:
        folder = (self.scratch / f"samples-{uuid4().hex[:8]}").absolute()
        folder.mkdir()
        for start in range(0, len(samples), size):
            part = range(start, min(start + size, len(samples)))
            write_archive(folder / f"{start}.zip", _entries(samples, part))
            yield Group(observer, self.shared, folder / f"{start}.zip", part, name)


def _entries(samples: Sequence[Feeds], part: range) -> Iterator[tuple[Key, NDArray[Any]]]:
    for number in part:
        for name, array in samples[number].items():
            yield (number, name), array


@dataclass(frozen=True, eq=False)
class Group:
    """Samples to show, as a task.

    Attributes:
        observer: Who looks; it has seen nothing yet.
        of: Of which model.
        samples: An archive of the samples.
        numbers: Their numbers.
        reader: The class of the reader that they come from, for messages.
    """

    observer: Merging
    of: "Shared"
    samples: Path
    numbers: range
    reader: str


@dataclass(frozen=True, eq=False)
class Shown:
    """An observer that has seen a group of so many samples."""

    observer: Any
    samples: int


def show_group(group: Group) -> Shown:
    """Show an observer a group of samples, in a worker.

    Raises:
        CalibrationError: A sample does not fit the model's inputs, or what the observer refuses.
    """
    of = group.of
    model = model_io.load(of.file)
    samples: dict[int, Feeds] = {number: {} for number in group.numbers}
    for (number, name), array in read_archive(group.samples):
        samples[number][name] = array
    reader, decoding = SampleReader(list(samples.values())), None
    if of.steps:
        inputs = ModelInputs.from_model(model, folder=of.folder)
        decoding = decoding_on(model, inputs, of.steps)
    first = group.numbers.start
    observe_samples(group.observer, model, reader, decoding=decoding, memory=of.memory, first=first, name=group.reader)
    return Shown(group.observer, len(samples))
