"""Activations looked at while a model runs over calibration samples, in bounded memory.

The graph gets extra outputs and loses all others (no logits, no caches, nothing that only they needed). What is reduced
to scalars in the graph never leaves onnxruntime; what is wanted whole is fetched in groups that fit a budget.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from numpy.typing import NDArray

from quarot_onnx.calibration.decoding import Decoding
from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.inputs import FLOATS
from quarot_onnx.calibration.padding import Padding, Sample
from quarot_onnx.calibration.readers import DataReader, wrap
from quarot_onnx.calibration.sample import check_feeds, check_ids, not_finite, run_sample
from quarot_onnx.errors import CalibrationError, did_you_mean
from quarot_onnx.progress import Progress
from quarot_onnx.sessions.skeleton import open_augmented

ROW_PEAKS = "RowPeaks"
"""What `observing_session` makes of a tensor under this name: max|x| along its last axis."""

_AXES_AS_INPUT = 18  # the opset from which on ReduceMax takes them so
_BUDGET = 512 << 20  # bytes of activations that are fetched at once


class Observer(Protocol):
    """Looks at the activations of samples."""

    def observe(self, sample: Sample) -> None:
        """Run one sample."""


def observe_samples(
    observer: Observer,
    model: ir.Model,
    reader: DataReader,
    *,
    max_samples: int | None = None,
    progress: Progress | None = None,
    decoding: Decoding | None = None,
) -> None:
    """Show an observer the samples of a reader, their padding taken off.

    Args:
        observer: Who looks.
        model: The model, for its inputs.
        reader: Any calibration reader.
        max_samples: Stop after so many samples; None for all.
        progress: Called after every sample.
        decoding: Makes the decode steps that are shown behind every sample; None for none.

    Raises:
        CalibrationError: A reader that is empty or does not fit the model's inputs.
    """
    if max_samples is not None and max_samples < 1:
        raise CalibrationError(f"max_samples {max_samples} leaves nothing to calibrate on: ask for 1 or more")
    rewindable, padding, count = wrap(reader), Padding(model), 0
    total = rewindable.size
    if total is not None and max_samples is not None:
        total = min(total, max_samples)
    for feeds in rewindable:
        check_feeds(feeds, model)
        check_ids(padding.tokens(feeds, count), rewindable.name, count)
        for sample in padding.samples(feeds, count):
            observer.observe(sample)
        for step in () if decoding is None else decoding.after(feeds, count):
            observer.observe(Sample(step, count))
        count += 1
        if progress is not None:
            progress(count, total)
        if count == max_samples:
            break
    if count == 0:
        raise rewindable.empty()


class Taker(Protocol):
    """Takes in the values of one activation."""

    def add(self, values: NDArray[np.float32]) -> bool:
        """Take in values; False where one of them is not finite."""


Counted = Callable[[Sample, NDArray[Any], str], NDArray[Any]]
"""The part of an activation that counts in a sample; the last argument is its name."""


class Fetched:
    """Activations that are fetched group by group, each handed to a taker of its own."""

    def __init__(
        self, model: ir.Model, takers: Mapping[str, Taker], threads: int | None, *, counted: Counted = Sample.rows
    ) -> None:
        """Hand every activation, or what ``counted`` says counts of it, to the taker of its name."""
        self._model, self._takers, self._threads, self._counted = model, takers, threads, counted
        self._names = list(takers)
        self._sizing = observing_session(model, self._names, ("Size",), threads)
        self._sizes: dict[object, list[int]] = {}
        self._sessions: list[tuple[list[str], Any]] = []

    def observe(self, sample: Sample) -> None:
        """Run one sample, once for every group of tensors."""
        for group, session in self._fitting_sessions(sample.feeds, sample.number):
            for name, values in zip(group, run_sample(session, sample.feeds, sample.number), strict=True):
                if not self._takers[name].add(self._counted(sample, values, name)):
                    raise not_finite(name, sample.number)

    def _fitting_sessions(self, feeds: Feeds, sample: int) -> list[tuple[list[str], Any]]:
        """Sessions whose outputs fit the budget; made anew when a sample is larger than those before it.

        An output that is not fetched stays alive to the end of a run all the same, so a group needs its own session.
        """
        shapes = tuple((name, array.shape) for name, array in sorted(feeds.items()))
        if shapes not in self._sizes:
            self._sizes[shapes] = [int(size) * 4 for size in run_sample(self._sizing, feeds, sample)]
        sizes = dict(zip(self._names, self._sizes[shapes], strict=True))
        fits = all(len(group) == 1 or sum(map(sizes.__getitem__, group)) <= _BUDGET for group, _ in self._sessions)
        if not self._sessions or not fits:
            self._sessions = []  # the old ones go before the new ones come
            groups = _groups(sizes)
            self._sessions = [
                (group, observing_session(self._model, group, (None,), self._threads)) for group in groups
            ]
        return self._sessions


def _groups(sizes: dict[str, int]) -> list[list[str]]:
    """Split tensors, in order, into groups of at most the budget or of one."""
    groups: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not groups or filled + size > _BUDGET:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def observing_session(model: ir.Model, names: Sequence[str], ops: Sequence[str | None], threads: int | None) -> Any:
    """A session whose outputs are what each op (None: the tensor itself) makes of each tensor, as float32."""
    model = model.clone()
    graph, values = model.graph, find_values(model, names)
    graph.outputs.clear()
    for number, value in enumerate(values):
        stem = f"quarot_calibration/{number}"
        # The cast also gives every observed tensor an output of its own, whatever its name or use.
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{stem}/cast")
        nodes = [cast]
        for op in ops:
            if op is None:
                output = cast.outputs[0]
            elif op == ROW_PEAKS:
                nodes += _row_peaks(model, cast.outputs[0], stem)
                output = nodes[-1].outputs[0]
            else:
                attributes = {} if op == "Size" else {"keepdims": 0}
                node = ir.node(op, [cast.outputs[0]], attributes, name=f"{stem}/{op}")
                nodes.append(node)
                output = node.outputs[0]
                output.shape = ir.Shape([])
            output.name = f"{stem}/{op or 'value'}"
            output.dtype = ir.DataType.INT64 if op == "Size" else ir.DataType.FLOAT
            graph.outputs.append(output)
        producer = value.producer()
        if producer is None:
            graph.insert_before(graph[0], nodes)
        else:
            graph.insert_after(producer, nodes)
    common_passes.RemoveUnusedNodesPass()(model)
    return open_augmented(model, threads=threads)


def _row_peaks(model: ir.Model, value: ir.Value, stem: str) -> list[ir.Node]:
    """Nodes that take max|x| along the last axis."""
    magnitude = ir.node("Abs", [value], name=f"{stem}/Abs")
    inputs, attributes = [magnitude.outputs[0]], {"keepdims": 0}
    if model.graph.opset_imports[""] >= _AXES_AS_INPUT:
        axes = ir.Value(name=f"{stem}/axes", const_value=ir.tensor([-1], name=f"{stem}/axes"))
        model.graph.register_initializer(axes)
        return [magnitude, ir.node("ReduceMax", [*inputs, axes], attributes, name=f"{stem}/ReduceMax")]
    return [magnitude, ir.node("ReduceMax", inputs, attributes | {"axes": [-1]}, name=f"{stem}/ReduceMax")]


def find_values(model: ir.Model, names: Sequence[str]) -> list[ir.Value]:
    """The values of these names.

    Raises:
        CalibrationError: An unknown or non-float one.
    """
    known = {value.name: value for value in model.graph.inputs}
    known |= {output.name: output for node in model.graph for output in node.outputs}
    for name in names:
        if name in model.graph.initializers or name not in known:
            kind = "a weight" if name in model.graph.initializers else "not in the graph"
            hint = did_you_mean(name, (other for other in known if other))
            raise CalibrationError(f"tensor {name!r} is {kind}: ranges are taken of activations{hint}")
        dtype = known[name].dtype
        if dtype is not None and dtype not in FLOATS:
            raise CalibrationError(f"tensor {name!r} is {dtype.name}: ranges are taken of float activations")
    return [known[name] for name in names]
