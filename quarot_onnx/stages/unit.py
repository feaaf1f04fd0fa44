"""One unit of samples taken through one stage, as a task that any process can do: in a worker, on shared storage.

A task is a pure function of what lies there: the model, the rounded weights of the stage before, the unit's inputs and
what earlier segments left of it (:mod:`quarot_onnx.stages.shared_states`). What its own segment leaves is written, and
its products are returned; or panels of the sums are made of what all units left. Done twice, as when a worker is lost,
a task writes and returns the same once more.
"""

from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.hessian import PanelAccumulator, PanelSums, Portions, Products, products
from quarot_onnx.calibration.padding import Mask, Sample
from quarot_onnx.distributed.worker import kept
from quarot_onnx.errors import ClusterError
from quarot_onnx.graph.linear import Linear, linear_at
from quarot_onnx.graph.routing import routed_values
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.states import read_archive
from quarot_onnx.stages.blocks import Segments, Stage
from quarot_onnx.stages.passing import Passage, Step, entering
from quarot_onnx.stages.runner import FLOAT, QUANTIZED
from quarot_onnx.stages.shared_states import FEEDS, HeldStates, PathStates, Plan


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
        summing: Whether its products are wanted.
    """

    plan: Plan
    step: Step
    unit: int
    first: int
    numbers: tuple[int, ...]
    visible: tuple[Mask | None, ...]
    summing: bool = True


@dataclass(frozen=True, eq=False)
class PanelTask:
    """Some panels of the sums of a stage, over all units, which went through it before.

    Attributes:
        units: All of them, in order.
        places: Which panels.
    """

    units: tuple[UnitTask, ...]
    places: tuple[int, ...]


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
    with _shared_storage():
        return _taken(task)


def sum_panels(task: PanelTask) -> PanelSums:
    """Sum up some panels of a stage over all units, from the hidden states that they left.

    Raises:
        CalibrationError: NaN or infinity.
        ClusterError: What has to lie on shared storage does not.
    """
    plan, step = task.units[0].plan, task.units[0].step
    with _shared_storage():
        opened = _opened(plan)
        stage = opened.stages[step.number]
        sums = PanelAccumulator(stage.linears[0].in_features, task.places, drift=plan.follow_float)
        portions = Portions(sums.take, drift=plan.follow_float)
        for unit in task.units:
            with _paths(unit, opened) as paths:
                for place, sample in _samples(unit, {stage.input.name or ""}):
                    held = {path: HeldStates(states, place) for path, states in paths.items()}
                    portions.add(*entering(stage, step.activation, sample, held[QUANTIZED], held.get(FLOAT)))
            portions.end_unit()
    return sums.finish()


@contextmanager
def _shared_storage() -> Iterator[None]:
    """Tell what is not there."""
    try:
        yield
    except FileNotFoundError as error:
        raise ClusterError(
            f"{error.filename} is not there for a worker: model and output have to lie on storage that all workers "
            "share, under the same path"
        ) from error


def _opened(plan: Plan) -> "_Opened":
    return kept("stages of a model", plan.token, lambda: _Opened.of(plan))


@contextmanager
def _paths(task: UnitTask, opened: "_Opened") -> Iterator[dict[str, PathStates]]:
    """The hidden states of a unit."""
    with ExitStack() as stack:
        yield {
            path: stack.enter_context(PathStates(task.plan, task.unit, task.step.number, path, opened.segments.origins))
            for path in ((QUANTIZED, FLOAT) if task.plan.follow_float else (QUANTIZED,))
        }


def _taken(task: UnitTask) -> UnitSums:
    plan, number = task.plan, task.step.number
    opened = _opened(plan)
    with _paths(task, opened) as paths:
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
            held = {path: HeldStates(states, place) for path, states in paths.items()}
            x, exact = passage.run(sample, held[QUANTIZED], held.get(FLOAT))
            if task.summing:
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
        nodes, routed = list(model.graph), routed_values(model.graph)
        stages = []
        for places, block in plan.stages:
            linears = tuple(_linear(nodes[place]) for place in places)
            stages.append(Stage(linears[0].input, linears, block, linears[0].input in routed))
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
