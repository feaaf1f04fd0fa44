"""Run a model stage by stage over the calibration samples, as a float model and as the model quantized so far.

Both paths share the inputs and segment 0. From then on the quantized path multiplies by the weights that it was given,
and its stages read inputs that went through the activation's quantization. A stage's inputs are seen once, summed into
statistics and forgotten when nothing needs them any more; what lies between segments is the residual stream and what
else is carried (:mod:`quarot_onnx.stages.blocks`). Samples are run side by side, each on one core.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.hessian import Accumulator, Statistics
from quarot_onnx.calibration.padding import Padding
from quarot_onnx.calibration.sample import check_feeds, fed_defaults, not_finite, run_sample
from quarot_onnx.errors import CalibrationError
from quarot_onnx.graph.linear import WEIGHT_INPUT
from quarot_onnx.piecewise.states import States
from quarot_onnx.sessions.skeleton import open_augmented
from quarot_onnx.stages.blocks import Segment, Segments, Stage
from quarot_onnx.threads import spread, thread_count

Fake = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""An activation [rows, in] to what quantizing and dequantizing makes of it."""

_INPUT, _WEIGHT = "quarot/stage_input", "quarot/stage_weight"

_WAVE = 2
"""Samples for each thread before their inputs are summed up: more wait less for the slowest, and take more memory."""


@dataclass(frozen=True, eq=False)
class Replacement:
    """What the quantized path does at one stage.

    Attributes:
        weights: For each of the stage's Linears what W (alpha included) is replaced with, float32 [in, out].
        activation: What happens to the stage's input; None leaves it.
    """

    weights: tuple[NDArray[np.float32], ...]
    activation: Fake | None


class StageRunner:
    """Takes the samples through a model's stages, in order."""

    def __init__(
        self,
        model: ir.Model,
        stages: Sequence[Stage],
        samples: Sequence[Feeds],
        *,
        follow_float: bool,
        scratch: Path,
        limit: int,
    ) -> None:
        """Label the graph; nothing is run yet.

        Args:
            model: The float model, its large weights external; it is not changed.
            stages: From ``blocks.find_stages``.
            samples: Input name to array, for each sample. What their mask hides is not summed up.
            follow_float: Whether the float path is needed too (for the drift D).
            scratch: A folder for hidden states that do not fit into memory.
            limit: Bytes of hidden states to keep in memory, for both paths together.

        Raises:
            CalibrationError: A sample does not name the model's inputs, or the mask hides all of them.
        """
        for feeds in samples:
            check_feeds(feeds, model)
        defaults, padding = fed_defaults(samples, model), Padding(model)
        self._segments, self._stages = Segments(model, stages, defaults), stages
        parts = [part for number, feeds in enumerate(samples) for part in padding.samples(feeds, number)]
        if not parts:
            raise CalibrationError(f"nothing is visible in any of the {len(samples)} samples: look at their mask")
        self._samples = [replace(part, feeds=defaults | part.feeds) for part in parts]
        self._writing = Lock()
        share = limit // 2 if follow_float else limit
        self._quantized = States(scratch / "quantized", share)
        self._float = States(scratch / "float", share) if follow_float else None

    def statistics(self, number: int, before: Replacement | None, activation: Fake | None) -> Statistics:
        """Run up to the input of a stage and sum up what comes in.

        Args:
            number: The stage; they are asked for in order, each once.
            before: What the quantized path does at the stage before; None for the first stage.
            activation: What quantization does to this stage's input before it is summed up; None leaves it.

        Raises:
            CalibrationError: A sample does not fit the model, or gives NaN or infinity.
        """
        stage, segment = self._stages[number], self._segment(number)
        followed = self._float is not None and number > 0
        session = self._open(segment) if followed else None
        replaced = self._replaced(segment, number, before)
        linear = stage.linears[0]
        sums = Accumulator(linear.in_features, drift=self._float is not None)
        weights = {} if before is None else self._weights(number - 1, before)

        def run(sample: int) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
            """What comes in on both paths."""
            feeds = self._samples[sample].feeds
            if self._float is not None and followed:
                self._advance(self._float, segment, session, sample, feeds)
            extra = {} if before is None else {_INPUT: self._input(number - 1, before, sample)}
            self._advance(self._quantized, segment, replaced, sample, {**feeds, **weights, **extra})
            if self._float is not None and not followed:
                self._keep(self._float, sample, {name: self._quantized[sample, name] for name in segment.outputs})
            x = self._rows(self._quantized, number, sample)
            if not np.isfinite(x).all():
                raise not_finite(stage.input.name or "", self._samples[sample].number)
            exact = None if self._float is None else self._rows(self._float, number, sample)
            return x if activation is None else activation(x), exact

        samples, wave = range(len(self._samples)), _WAVE * thread_count()
        for start in samples[::wave]:
            for x, exact in spread(run, samples[start : start + wave]):
                sums.add(x, exact)
        return sums.finish()

    def save(self, folder: Path) -> None:
        """Write all hidden states, to go on from here in another process."""
        self._quantized.save(folder / "quantized.zip")
        if self._float is not None:
            self._float.save(folder / "float.zip")

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote."""
        self._quantized.load(folder / "quantized.zip")
        if self._float is not None:
            self._float.load(folder / "float.zip")

    def _segment(self, number: int) -> Segment:
        """The piece that computes a stage's input; where the graph does not tell its inputs' types, the arrays do."""
        segment = self._segments.segment(number)
        for value in segment.model.graph.inputs:
            if value.type is None:
                value.type = ir.TensorType(ir.DataType.from_numpy(self._quantized[0, str(value.name)].dtype))
        return segment

    def _replaced(self, segment: Segment, number: int, before: Replacement | None) -> Any:
        """A session of the segment in which the stage before takes its input and weights from outside."""
        if before is None:
            return self._open(segment)
        graph = segment.model.graph
        previous = self._stages[number - 1]
        dtype = previous.linears[0].weight.dtype  # both operands of a product have one type
        x = ir.Value(name=_INPUT, type=ir.TensorType(dtype))
        graph.inputs.append(x)
        for index, (node, linear) in enumerate(zip(segment.nodes, previous.linears, strict=True)):
            if node is None:
                continue
            w = ir.Value(name=f"{_WEIGHT}_{index}", type=ir.TensorType(linear.weight.dtype))
            graph.inputs.append(w)
            node.replace_input_with(0, x)
            node.replace_input_with(WEIGHT_INPUT, w)
            if node.op_type != "MatMul":
                node.attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)
                node.attributes["transB"] = ir.AttrInt64("transB", 0)
        _drop_unused(graph)
        return self._open(segment)

    def _open(self, segment: Segment) -> Any:
        """A session; None where there is nothing to run, as a stage reads an input of the graph."""
        return open_augmented(segment.model, threads=1) if segment.outputs else None

    def _weights(self, number: int, replacement: Replacement) -> Feeds:
        """The weights of a stage that are fed, in the types of its Linears."""
        linears = self._stages[number].linears
        return {
            f"{_WEIGHT}_{index}": weight.astype(linear.weight.dtype.numpy(), copy=False)
            for index, (linear, weight) in enumerate(zip(linears, replacement.weights, strict=True))
        }

    def _input(self, number: int, replacement: Replacement, sample: int) -> NDArray[Any]:
        """The input of a stage on the quantized path, as its Linears' nodes take it."""
        stage = self._stages[number]
        name = stage.input.name or ""
        held = self._samples[sample].feeds
        raw = held[name] if name in held else self._quantized[sample, name]
        if replacement.activation is None:
            return raw
        rows = self._rows(self._quantized, number, sample, hidden=True)
        changed = replacement.activation(rows).astype(raw.dtype, copy=False)
        flipped = stage.linears[0].transposed_input
        return np.ascontiguousarray(changed.T) if flipped else changed.reshape(raw.shape)

    def _advance(self, states: States, segment: Segment, session: Any, sample: int, given: Feeds) -> None:
        """Run one segment on one sample and keep what it leaves."""
        if session is not None:
            names, number = [argument.name for argument in session.get_inputs()], self._samples[sample].number
            feeds = {name: given[name] if name in given else states[sample, name] for name in names}
            self._keep(states, sample, dict(zip(segment.outputs, run_sample(session, feeds, number), strict=True)))
        with self._writing:
            for name in segment.expires:
                states.discard((sample, name))

    def _keep(self, states: States, sample: int, arrays: Feeds) -> None:
        """Keep what a sample left; other samples may be on their way in other threads."""
        with self._writing:
            for name, array in arrays.items():
                states[sample, name] = array

    def _rows(self, states: States, number: int, sample: int, *, hidden: bool = False) -> NDArray[np.float32]:
        """The input of a stage as float32 [rows, in]; with ``hidden`` also what the sample's mask hides."""
        run, stage = self._samples[sample], self._stages[number]
        name, linear = stage.input.name or "", stage.linears[0]
        array = run.feeds[name] if name in run.feeds else states[sample, name]
        array = array.T if linear.transposed_input else array
        rows = array if hidden else run.rows(array, name)
        return np.ascontiguousarray(rows.reshape(-1, linear.in_features), dtype=np.float32)


def _drop_unused(graph: ir.Graph) -> None:
    """Remove the weights that were replaced, so that they are not loaded, and what only led to them."""
    for node in reversed(graph):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
