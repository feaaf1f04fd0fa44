"""One unit of samples taken through one stage, as a task that any process can do: in a worker, on shared storage.

A task is a pure function of what lies there: the model, the rounded weights of the stage before, the unit's inputs and
what earlier segments left of it. What its own segment leaves is written whole or not at all, and its products are
returned. Done twice, as when a worker is lost, it writes and returns the same once more::

    units/000003/feeds.zip             the inputs of the unit's samples
    units/000003/quantized-000017.zip  what segment 17 left of them on the quantized path
"""

import zipfile
from collections.abc import Container, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.hessian import Portions, Products, products
from quarot_onnx.calibration.padding import Mask, Sample
from quarot_onnx.distributed.worker import kept
from quarot_onnx.errors import ClusterError
from quarot_onnx.graph.linear import Linear, linear_at
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.states import add_entry, read_archive, read_entry
from quarot_onnx.stages.blocks import Segments, Stage
from quarot_onnx.stages.passing import Passage, Step
from quarot_onnx.stages.runner import FLOAT, QUANTIZED

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


@dataclass(frozen=True, eq=False)
class UnitTask:
    """A unit of samples at a stage.

    Attributes:
        plan: What all tasks share.
        step: The stage.
        unit: The unit's number.
        first: The place of its first sample among all.
        numbers: The reader's sample that each of its samples comes from.
        visible: The positions of each that count; None where all do.
    """

    plan: Plan
    step: Step
    unit: int
    first: int
    numbers: tuple[int, ...]
    visible: tuple[Mask | None, ...]


@dataclass(frozen=True, eq=False)
class UnitSums:
    """What comes of it.

    Attributes:
        products: Of each portion of its rows.
        tokens: Its rows.
    """

    products: tuple[Products, ...]
    tokens: int


def graph_digest(model: ir.Model) -> str:
    """What tells one graph from another: its nodes and how they are joined."""
    digest = sha256()
    for node in model.graph:
        ends = ([v.name if v is not None else None for v in node.inputs], [v.name for v in node.outputs])
        digest.update(repr((node.domain, node.op_type, node.name, ends)).encode())
    return digest.hexdigest()


def take_unit(task: UnitTask) -> UnitSums:
    """Take a unit through its stage's segment.

    Raises:
        CalibrationError: A sample does not fit the model, or gives NaN or infinity.
        ClusterError: What has to lie on shared storage does not.
    """
    try:
        return _taken(task)
    except FileNotFoundError as error:
        raise ClusterError(
            f"{error.filename} is not there for a worker: model and output have to lie on storage that all workers "
            "share, under the same path"
        ) from error


def _taken(task: UnitTask) -> UnitSums:
    plan, number = task.plan, task.step.number
    opened = kept("stages of a model", plan.token, lambda: _Opened.of(plan))
    with ExitStack() as stack:
        paths = {
            path: stack.enter_context(_Path(task, path, opened.segments.origins))
            for path in ((QUANTIZED, FLOAT) if plan.follow_float else (QUANTIZED,))
        }
        passage = kept(
            "stage",
            (plan.token, number),
            lambda: Passage(
                opened.segments, opened.stages, task.step, lambda name: paths[QUANTIZED].read(task.first, name).dtype
            ),
        )
        found: list[Products] = []
        portions = Portions(lambda rows, missing: found.append(products(rows, missing)), drift=plan.follow_float)
        tokens = 0
        for place, sample in _samples(task, passage.reads):
            held = {path: _Held(states, place) for path, states in paths.items()}
            x, exact = passage.run(sample, held[QUANTIZED], held.get(FLOAT))
            portions.add(x, exact)
            tokens += len(x)
        portions.end_unit()
    return UnitSums(tuple(found), tokens)


@dataclass(frozen=True, eq=False)
class _Opened:
    """A model's stages, found once in a process."""

    stages: tuple[Stage, ...]
    segments: Segments

    @classmethod
    def of(cls, plan: Plan) -> "_Opened":
        model = model_io.load(plan.model)
        if graph_digest(model) != plan.digest:
            raise ClusterError(f"a worker reads another model at {plan.model} than the command does: share its folder")
        nodes = list(model.graph)
        stages = []
        for places, block in plan.stages:
            linears = tuple(_linear(nodes[place]) for place in places)
            stages.append(Stage(linears[0].input, linears, block))
        return cls(tuple(stages), Segments(model, stages, plan.fed))


def _linear(node: ir.Node) -> Linear:
    linear = linear_at(node)
    assert linear is not None, "the graph is the same"
    return linear


def _samples(task: UnitTask, names: Container[str]) -> Iterable[tuple[int, Sample]]:
    """The unit's samples, with their places among all; of their inputs those that are read."""
    feeds: dict[int, dict[str, NDArray[Any]]] = {}
    for (place, name), array in read_archive(task.plan.unit(task.unit) / FEEDS, names):
        feeds.setdefault(place, {})[name] = array
    for offset, (number, visible) in enumerate(zip(task.numbers, task.visible, strict=True)):
        place = task.first + offset
        yield place, Sample(feeds.get(place, {}), number, visible)


class _Path:
    """The hidden states of a unit on one path: those that earlier segments left, and those that this one leaves."""

    def __init__(self, task: UnitTask, path: str, origins: Mapping[str, int]) -> None:
        self._task, self._name, self._origins = task, path, origins
        self._archives: dict[int, zipfile.ZipFile] = {}
        self._target = task.plan.states(task.unit, path, task.step.number)
        self._partial = self._target.with_suffix(f".{uuid4().hex}")
        self._writing: zipfile.ZipFile | None = None

    def __enter__(self) -> "_Path":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
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
            path = self._task.plan.states(self._task.unit, self._name, origin)
            self._archives[origin] = zipfile.ZipFile(path)
        return read_entry(self._archives[origin], (place, name))

    def write(self, place: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep what this segment leaves."""
        if self._writing is None:
            self._writing = zipfile.ZipFile(self._partial, "w", zipfile.ZIP_STORED)
        for name, array in arrays.items():
            add_entry(self._writing, (place, name), array)


@dataclass(eq=False)
class _Held:
    """What is held of one sample on one path, see ``passing.Held``."""

    states: _Path
    place: int
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self.arrays:
            self.arrays[name] = self.states.read(self.place, name)
        return self.arrays[name]

    def update(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.arrays.update(arrays)
        if arrays:
            self.states.write(self.place, arrays)

    def discard(self, names: Iterable[str]) -> None:
        """The files go when all units are through."""
