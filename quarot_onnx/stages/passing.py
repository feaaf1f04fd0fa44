"""One stage's segment, opened: what takes a sample from what earlier segments left of it to the stage's input.

It knows nothing of where samples and hidden states lie, nor of how many samples there are: a run in this process
(:mod:`quarot_onnx.stages.runner`) and one that is spread over other machines (:mod:`quarot_onnx.stages.spread`) compute
with it, and so the same bits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.padding import Padding, Sample
from quarot_onnx.calibration.sample import check_feeds, fed_defaults, not_finite, run_sample
from quarot_onnx.calibration.units import units
from quarot_onnx.errors import CalibrationError
from quarot_onnx.graph.linear import WEIGHT_INPUT
from quarot_onnx.graph.parts import drop_unused
from quarot_onnx.sessions.skeleton import open_augmented
from quarot_onnx.stages.blocks import Segment, Segments, Stage

Floats = NDArray[np.float32]

Fake = Callable[[Floats], Floats]
"""An activation [rows, in] to what quantizing and dequantizing makes of it."""

_INPUT, _WEIGHT = "quarot/stage_input", "quarot/stage_weight"


@dataclass(frozen=True, eq=False)
class Replacement:
    """What the quantized path does at one stage.

    Attributes:
        weights: Gives for each of the stage's Linears what W (alpha included) is replaced with, float32 [in, out].
        activation: What happens to the stage's input; None leaves it.
    """

    weights: Callable[[], tuple[Floats, ...]]
    activation: Fake | None


class Held(Protocol):
    """What segments left of one sample on one path, by the names of the values."""

    def __getitem__(self, name: str) -> NDArray[Any]:
        """An array."""

    def update(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take what a segment leaves."""

    def discard(self, names: Iterable[str]) -> None:
        """Forget what nothing needs any more."""


@dataclass(frozen=True, eq=False)
class Material:
    """The samples of a run.

    Attributes:
        samples: What is run at once, each.
        units: Which of them are summed up together.
        fed: Names of inputs with a default that are fed nevertheless.
    """

    samples: Sequence[Sample]
    units: Sequence[range]
    fed: frozenset[str]

    @classmethod
    def of(cls, model: ir.Model, samples: Sequence[Feeds]) -> "Material":
        """What comes of the samples of a reader.

        Raises:
            CalibrationError: A sample does not name the model's inputs, or the mask hides all of them.
        """
        for feeds in samples:
            check_feeds(feeds, model)
        defaults, padding = fed_defaults(samples, model), Padding(model)
        parts = [part for number, feeds in enumerate(samples) for part in padding.samples(feeds, number)]
        if not parts:
            raise CalibrationError(f"nothing is visible in any of the {len(samples)} samples: look at their mask")
        given = [replace(part, feeds=defaults | part.feeds) for part in parts]
        return cls(given, units([padding.rows(part) for part in given]), frozenset(defaults))


@dataclass(frozen=True, eq=False)
class Step:
    """What one stage asks for.

    Attributes:
        number: The stage.
        before: What the quantized path does at the stage before; None for the first stage.
        activation: What quantization does to this stage's input before it is summed up; None leaves it.
        follow_float: Whether the float path is needed too.
    """

    number: int
    before: Replacement | None
    activation: Fake | None
    follow_float: bool


class Passage:
    """The segment before a stage, opened once on each path."""

    def __init__(
        self, segments: Segments, stages: Sequence[Stage], step: Step, dtype_of: Callable[[str], np.dtype[Any]]
    ) -> None:
        """Open its sessions.

        Args:
            segments: Of the float model.
            stages: Its stages.
            step: Which one, and what happens there.
            dtype_of: The types of what earlier segments left, where the graph does not tell.
        """
        self._stages, self._step = stages, step
        self.segment = segments.segment(step.number)
        for value in self.segment.model.graph.inputs:
            if value.type is None:
                value.type = ir.TensorType(ir.DataType.from_numpy(dtype_of(str(value.name))))
        self._float = _open(self.segment) if step.follow_float and step.number > 0 else None
        self._quantized = self._replaced()
        self._weights = {} if step.before is None else self._fed_weights(step.number - 1, step.before)

    @property
    def reads(self) -> frozenset[str]:
        """The names of all that is read of a sample."""
        sessions = [session for session in (self._float, self._quantized) if session is not None]
        inputs = {str(argument.name) for session in sessions for argument in session.get_inputs()}
        number = self._step.number
        return frozenset(inputs | {stage.input.name or "" for stage in self._stages[max(number - 1, 0) : number + 1]})

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the segment leaves."""
        return self.segment.outputs

    def run(self, sample: Sample, quantized: Held, float_: Held | None) -> tuple[Floats, Floats | None]:
        """Take one sample through it.

        Args:
            sample: The sample.
            quantized: What was left of it on the quantized path.
            float_: The same on the float path; None where that is not followed.

        Returns:
            What comes into the stage on both paths, [rows, in].

        Raises:
            CalibrationError: The sample does not fit the model, or gives NaN or infinity.
        """
        step = self._step
        if float_ is not None and step.number > 0:
            self._advance(self._float, sample, float_, {})
        more = dict(self._weights)
        if step.before is not None:
            more[_INPUT] = self._input(step.number - 1, step.before, sample, quantized)
        left = self._advance(self._quantized, sample, quantized, more)
        if float_ is not None and step.number == 0:
            float_.update(left)
        return entering(self._stages[step.number], step.activation, sample, quantized, float_)

    def _replaced(self) -> Any:
        """A session of the segment in which the stage before takes its input and weights from outside."""
        if self._step.before is None:
            return _open(self.segment)
        graph = self.segment.model.graph
        previous = self._stages[self._step.number - 1]
        dtype = previous.linears[0].weight.dtype  # both operands of a product have one type
        x = ir.Value(name=_INPUT, type=ir.TensorType(dtype))
        graph.inputs.append(x)
        for index, (node, linear) in enumerate(zip(self.segment.nodes, previous.linears, strict=True)):
            if node is None:
                continue
            w = ir.Value(name=f"{_WEIGHT}_{index}", type=ir.TensorType(linear.weight.dtype))
            graph.inputs.append(w)
            node.replace_input_with(0, x)
            node.replace_input_with(WEIGHT_INPUT, w)
            if node.op_type != "MatMul":
                node.attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)
                node.attributes["transB"] = ir.AttrInt64("transB", 0)
        drop_unused(graph)
        return _open(self.segment)

    def _fed_weights(self, number: int, replacement: Replacement) -> Feeds:
        """The weights of a stage that are fed, in the types of its Linears."""
        linears = self._stages[number].linears
        return {
            f"{_WEIGHT}_{index}": weight.astype(linear.weight.dtype.numpy(), copy=False)
            for index, (linear, weight) in enumerate(zip(linears, replacement.weights(), strict=True))
        }

    def _input(self, number: int, replacement: Replacement, sample: Sample, held: Held) -> NDArray[Any]:
        """The input of a stage on the quantized path, as its Linears' nodes take it."""
        stage = self._stages[number]
        name = stage.input.name or ""
        raw = sample.feeds[name] if name in sample.feeds else held[name]
        if replacement.activation is None:
            return raw
        rows = _rows(stage, sample, held, hidden=True)
        changed = replacement.activation(rows).astype(raw.dtype, copy=False)
        flipped = stage.linears[0].transposed_input
        return np.ascontiguousarray(changed.T) if flipped else changed.reshape(raw.shape)

    def _advance(self, session: Any, sample: Sample, held: Held, more: Feeds) -> Feeds:
        """Run the segment on one path; gives what it leaves, and keeps it."""
        left: Feeds = {}
        if session is not None:
            given = sample.feeds | more
            names = [argument.name for argument in session.get_inputs()]
            feeds = {name: given[name] if name in given else held[name] for name in names}
            left = dict(zip(self.outputs, run_sample(session, feeds, sample.number), strict=True))
        held.update(left)
        held.discard(self.segment.expires)
        return left


def entering(
    stage: Stage, activation: Fake | None, sample: Sample, quantized: Held, float_: Held | None
) -> tuple[Floats, Floats | None]:
    """What comes into a stage on both paths, [rows, in], once the segment before it was run.

    The rows of a stage that is routed do not belong together: those of the quantized path stand for both.

    Args:
        stage: The stage.
        activation: What quantization does to its input; None leaves it.
        sample: The sample.
        quantized: What was left of it on the quantized path.
        float_: The same on the float path; None where that is not followed.

    Raises:
        CalibrationError: NaN or infinity.
    """
    x = _rows(stage, sample, quantized)
    if not np.isfinite(x).all():
        raise not_finite(stage.input.name or "", sample.number)
    exact = None if float_ is None else x if stage.routed else _rows(stage, sample, float_)
    return x if activation is None else activation(x), exact


def _rows(stage: Stage, sample: Sample, held: Held, *, hidden: bool = False) -> Floats:
    """The input of a stage as float32 [rows, in]; with ``hidden`` also what the sample's mask hides."""
    name, linear = stage.input.name or "", stage.linears[0]
    array = sample.feeds[name] if name in sample.feeds else held[name]
    array = array.T if linear.transposed_input else array
    rows = array if hidden else sample.rows(array, name)
    return np.ascontiguousarray(rows.reshape(-1, linear.in_features), dtype=np.float32)


def _open(segment: Segment) -> Any:
    """A session; None where there is nothing to run, as a stage reads an input of the graph."""
    return open_augmented(segment.model, threads=1) if segment.outputs else None
