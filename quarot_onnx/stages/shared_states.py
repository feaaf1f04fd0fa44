"""What the units of a run leave between segments, in files that all machines see.

::

    units/000003/feeds.zip             the inputs of the unit's samples
    units/000003/quantized-000017.zip  what segment 17 left of them on the quantized path

A file appears whole or not at all, and is never changed.
"""

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from numpy.typing import NDArray

from quarot_onnx.piecewise.states import add_entry, read_entry

FEEDS = "feeds.zip"


@dataclass(frozen=True)
class Plan:
    """What all tasks of a run have in common.

    Attributes:
        token: Of the run.
        model: The float model's file.
        digest: Of its graph, as ``graph_digest`` gives it.
        stages: For each stage the places of its nodes in the graph, and its block.
        fed: Names of inputs with a default that are fed nevertheless.
        follow_float: Whether the float path is needed too.
        folder: Where units lie.
    """

    token: str
    model: Path
    digest: str
    stages: tuple[tuple[tuple[int, ...], int], ...]
    fed: frozenset[str]
    follow_float: bool
    folder: Path

    def unit(self, unit: int) -> Path:
        """The folder of a unit."""
        return self.folder / f"{unit:06}"

    def states(self, unit: int, path: str, segment: int) -> Path:
        """What a segment left of a unit on a path."""
        return self.unit(unit) / f"{path}-{segment:06}.zip"


class PathStates:
    """The hidden states of a unit on one path: those that earlier segments left, and those that this one leaves."""

    def __init__(self, plan: Plan, unit: int, number: int, path: str, origins: Mapping[str, int]) -> None:
        """Nothing is opened yet.

        Args:
            plan: Of the run.
            unit: The unit.
            number: The segment.
            path: On which path.
            origins: Which segment leaves a value.
        """
        self._plan, self._unit, self._name, self._origins = plan, unit, path, origins
        self._archives: dict[int, zipfile.ZipFile] = {}
        self._target = plan.states(unit, path, number)
        self._partial = self._target.with_suffix(f".{uuid4().hex}")
        self._writing: zipfile.ZipFile | None = None

    def __enter__(self) -> "PathStates":
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        """Close all; what was written appears, unless something went wrong."""
        for archive in self._archives.values():
            archive.close()
        if self._writing is not None:
            self._writing.close()
            if kind is None:
                self._partial.replace(self._target)
            else:
                self._partial.unlink(missing_ok=True)

    def read(self, place: int, name: str) -> NDArray[Any]:
        """What an earlier segment left."""
        origin = self._origins[name]
        if origin not in self._archives:
            path = self._plan.states(self._unit, self._name, origin)
            self._archives[origin] = zipfile.ZipFile(path)
        return read_entry(self._archives[origin], (place, name))

    def write(self, place: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep what this segment leaves."""
        if self._writing is None:
            self._writing = zipfile.ZipFile(self._partial, "w", zipfile.ZIP_STORED)
        for name, array in arrays.items():
            add_entry(self._writing, (place, name), array)


@dataclass(eq=False)
class HeldStates:
    """What is held of one sample on one path, see ``passing.Held``."""

    states: PathStates
    place: int
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """An array, read once."""
        if name not in self.arrays:
            self.arrays[name] = self.states.read(self.place, name)
        return self.arrays[name]

    def update(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take what a segment leaves."""
        self.arrays.update(arrays)
        if arrays:
            self.states.write(self.place, arrays)

    def discard(self, names: Iterable[str]) -> None:
        """The files go when all units are through."""
