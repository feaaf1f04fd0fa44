"""Ranges of activations over calibration samples, in bounded memory.

The graph gets extra outputs and loses all others (no logits, no caches, nothing that only they needed). For min-max
those are scalars: the minimum, maximum and sum of every tensor are taken where the tensor is made, and no activation
leaves onnxruntime. The sum is there for NaN, which onnxruntime's ReduceMin passes over. A percentile needs the values
themselves: they are fetched in groups that fit a budget, and counted in histograms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.histogram import LogHistogram
from quarot_onnx.calibration.inputs import FLOATS
from quarot_onnx.calibration.padding import Padding, Sample
from quarot_onnx.calibration.readers import DataReader, wrap
from quarot_onnx.calibration.sample import check_feeds, check_ids, not_finite, run_sample
from quarot_onnx.config.enums import CalibMethod
from quarot_onnx.errors import CalibrationError, did_you_mean
from quarot_onnx.io import model_io
from quarot_onnx.progress import Progress
from quarot_onnx.sessions.skeleton import open_augmented

_BUDGET = 512 << 20  # bytes of activations that are fetched at once


@dataclass(frozen=True)
class Range:
    """The range of an activation: ``min <= max``, both finite."""

    min: float
    max: float


def collect_ranges(
    model: str | Path | ir.Model,
    tensor_names: Sequence[str],
    reader: DataReader,
    *,
    method: CalibMethod = CalibMethod.MinMax,
    percentile: float = 99.999,
    max_samples: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Range]:
    """The ranges of activations over the samples of a reader.

    Args:
        model: The ONNX file, or a model whose large weights are external tensors; it is not changed.
        tensor_names: Graph inputs or node outputs, float.
        reader: Any calibration reader; samples may differ in length.
        method: Min-max, or percentile.
        percentile: The central part of the values that the range holds, in percent; half of the rest is cut at either
            end (onnxruntime's convention). Bounds are exact to 0.4 %, rounded outwards.
        max_samples: Stop after so many samples; None for all.
        threads: onnxruntime's intra-op threads.
        progress: Called after every sample.

    Returns:
        Tensor name to range, in the order of ``tensor_names``.

    Raises:
        CalibrationError: An unknown or non-float tensor, a reader that is empty or does not fit the model's inputs,
            NaN or infinity in an activation, or a tensor that was empty in every sample.
        ModelError: The model cannot be loaded.
    """
    if not 0 < percentile <= 100:
        raise CalibrationError(f"percentile {percentile} is outside (0, 100]")
    if max_samples is not None and max_samples < 1:
        raise CalibrationError(f"max_samples {max_samples} leaves nothing to calibrate on: ask for 1 or more")
    loaded = model.clone() if isinstance(model, ir.Model) else model_io.load(model)
    names = list(dict.fromkeys(tensor_names))
    _find_values(loaded, names)
    rewindable, padding, count = wrap(reader), Padding(loaded), 0
    total = rewindable.size
    if total is not None and max_samples is not None:
        total = min(total, max_samples)
    observer: _MinMax | _Percentile
    if method is CalibMethod.MinMax:
        observer = _MinMax(loaded, names, threads)
    else:
        observer = _Percentile(loaded, names, threads, percentile)
    for feeds in rewindable:
        check_feeds(feeds, loaded)
        check_ids(padding.tokens(feeds, count), rewindable.name, count)
        for sample in padding.samples(feeds, count):
            observer.observe(sample)
        count += 1
        if progress is not None:
            progress(count, total)
        if count == max_samples:
            break
    if count == 0:
        raise rewindable.empty()
    return observer.ranges()


class _MinMax:
    """Running minimum and maximum of scalars taken in the graph; of a part of an activation outside of it."""

    def __init__(self, model: ir.Model, names: Sequence[str], threads: int | None) -> None:
        self._model, self._names, self._threads = model, names, threads
        self._parts: _Percentile | None = None
        self._low, self._high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
        self._session = _observing_session(model, names, ("ReduceMin", "ReduceMax", "ReduceSum"), threads)

    def observe(self, sample: Sample) -> None:
        """Run one sample."""
        if sample.visible is not None:
            self._parts = self._parts or _Percentile(self._model, self._names, self._threads, 100.0)
            self._parts.observe(sample)
            return
        found = run_sample(self._session, sample.feeds, sample.number)
        scalars = np.array(found, np.float64).reshape(len(self._names), 3)
        low, high, total = scalars.T
        # An empty tensor gives min = +inf, max = -inf, sum = 0.
        bad = np.isnan(total) | (np.isinf(low) & ~(low > high)) | (np.isinf(high) & ~(low > high))
        if bad.any():
            raise not_finite(self._names[int(np.flatnonzero(bad)[0])], sample.number)
        self._low, self._high = np.minimum(self._low, low), np.maximum(self._high, high)

    def ranges(self) -> dict[str, Range]:
        """The ranges so far."""
        bounds = zip(self._names, self._low.tolist(), self._high.tolist(), strict=True)
        parts = {} if self._parts is None else self._parts.bounds()
        both = ((name, (low, high), parts.get(name, (low, high))) for name, low, high in bounds)
        return {name: _range(name, min(a[0], b[0]), max(a[1], b[1])) for name, a, b in both}


class _Percentile:
    """Histograms of activations that are fetched group by group."""

    def __init__(self, model: ir.Model, names: Sequence[str], threads: int | None, percentile: float) -> None:
        self._model, self._names, self._threads, self._percentile = model, names, threads, percentile
        self._histograms = {name: LogHistogram() for name in names}
        self._sizing = _observing_session(model, names, ("Size",), threads)
        self._sizes: dict[object, list[int]] = {}
        self._sessions: list[tuple[list[str], Any]] = []

    def observe(self, sample: Sample) -> None:
        """Run one sample, once for every group of tensors."""
        for group, session in self._fitting_sessions(sample.feeds, sample.number):
            for name, values in zip(group, run_sample(session, sample.feeds, sample.number), strict=True):
                if not self._histograms[name].add(sample.rows(values, name)):
                    raise not_finite(name, sample.number)

    def bounds(self) -> dict[str, tuple[float, float]]:
        """The bounds so far, from infinity down where nothing was seen."""
        return {
            name: (np.inf, -np.inf) if histogram.empty else histogram.central(self._percentile)
            for name, histogram in self._histograms.items()
        }

    def ranges(self) -> dict[str, Range]:
        """The ranges so far."""
        return {name: _range(name, *bounds) for name, bounds in self.bounds().items()}

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
                (group, _observing_session(self._model, group, (None,), self._threads)) for group in groups
            ]
        return self._sessions


def _groups(sizes: dict[str, int]) -> list[list[str]]:
    """Split tensors, in order, into groups of at most the budget or of one."""
    groups: list[list[str]] = []
    filled = _BUDGET
    for name, size in sizes.items():
        if filled + size > _BUDGET:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _observing_session(model: ir.Model, names: Sequence[str], ops: Sequence[str | None], threads: int | None) -> Any:
    """A session whose outputs are what each op (None: the tensor itself) makes of each tensor, as float32."""
    model = model.clone()
    graph, values = model.graph, _find_values(model, names)
    graph.outputs.clear()
    for number, value in enumerate(values):
        stem = f"quarot_calibration/{number}"
        # The cast also gives every observed tensor an output of its own, whatever its name or use.
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{stem}/cast")
        nodes = [cast]
        for op in ops:
            if op is None:
                output = cast.outputs[0]
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


def _find_values(model: ir.Model, names: Sequence[str]) -> list[ir.Value]:
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


def _range(name: str, low: float, high: float) -> Range:
    if low > high:
        raise CalibrationError(f"activation {name!r} was empty in every sample: calibrate with longer samples")
    return Range(float(low), float(high))
