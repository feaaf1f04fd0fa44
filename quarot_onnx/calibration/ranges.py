"""Ranges of activations over calibration samples, in bounded memory.

The graph gets extra outputs and loses all others (no logits, no caches, nothing that only they needed). For min-max
those are scalars: the minimum, maximum and sum of every tensor are taken where the tensor is made, and no activation
leaves onnxruntime. The sum is there for NaN, which onnxruntime's ReduceMin passes over. A percentile needs the values
themselves, as all that weighs what a range cuts off: they are fetched in groups that fit a budget, and counted in
histograms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.clipping import least_divergence, least_error
from quarot_onnx.calibration.decoding import Decoding
from quarot_onnx.calibration.elsewhere import Elsewhere
from quarot_onnx.calibration.fetching import Fetched
from quarot_onnx.calibration.histogram import LogHistogram
from quarot_onnx.calibration.observing import (
    Observation,
    find_values,
    observe_samples,
    observing_session,
    run_observing,
)
from quarot_onnx.calibration.padding import Sample
from quarot_onnx.calibration.readers import DataReader
from quarot_onnx.calibration.sample import never_seen, not_finite
from quarot_onnx.config.enums import CalibMethod
from quarot_onnx.config.spec import QTensorConfig
from quarot_onnx.errors import CalibrationError
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.progress import Progress


@dataclass(frozen=True)
class Range:
    """The range of an activation: ``min <= max``, both finite."""

    min: float
    max: float


@dataclass(frozen=True)
class RangeRule:
    """How a range is found.

    Attributes:
        method: MinMax, Percentile, MinMSE or Entropy; or Auto, for who can tell which serves best.
        percentile: The central part of the values that Percentile holds, in percent; half of the rest is cut at either
            end (onnxruntime's convention). Bounds are exact to 0.4 %, rounded outwards.
        bits: Of the grid that MinMSE and Entropy are for.
        symmetric: Whether that has 0 in the middle.
    """

    method: CalibMethod = CalibMethod.MinMax
    percentile: float = 99.999
    bits: int = 8
    symmetric: bool = False

    @classmethod
    def of(cls, spec: QTensorConfig) -> "RangeRule":
        """The rule of an activation with a fixed grid; equal where the range is the same."""
        match spec.calibration_method:
            case CalibMethod.MinMax:
                return cls()
            case CalibMethod.Percentile:
                return cls(CalibMethod.Percentile, spec.percentile)
            case method:
                return cls(method, bits=spec.bits, symmetric=spec.symmetric)

    def bounds(self, histogram: LogHistogram) -> tuple[float, float]:
        """The range of what was counted."""
        low, high = histogram.bounds
        if self.method is CalibMethod.MinMax:
            return low, high
        if self.method is CalibMethod.Percentile:
            return histogram.central(self.percentile)
        low, high = min(low, 0.0), max(high, 0.0)
        if self.symmetric:
            low, high = -max(-low, high), max(-low, high)
        steps = (1 << self.bits) - 1
        if self.method is CalibMethod.MinMSE:
            return least_error(histogram.bins(), low, high, steps)
        return least_divergence(histogram.bins(), low, high, steps)


def collect_ranges(
    model: str | Path | ir.Model,
    tensor_names: Sequence[str],
    reader: DataReader,
    *,
    rule: RangeRule = RangeRule(),
    max_samples: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    decoding: Decoding | None = None,
    memory: Memory = WHOLE,
    elsewhere: Elsewhere | None = None,
) -> dict[str, Range]:
    """The ranges of activations over the samples of a reader.

    Args:
        model: The ONNX file, or a model whose large weights are external tensors; it is not changed.
        tensor_names: Graph inputs or node outputs, float.
        reader: Any calibration reader; samples may differ in length.
        rule: How; not Auto.
        max_samples: Stop after so many samples; None for all.
        threads: onnxruntime's intra-op threads.
        progress: Called after every sample.
        decoding: Makes the decode steps that count, too; None for none.
        memory: Whether the model is run piece by piece.
        elsewhere: Workers that run the samples, with the decode steps that they make; None where that is done here.

    Returns:
        Tensor name to range, in the order of ``tensor_names``.

    Raises:
        CalibrationError: An unknown or non-float tensor, a reader that is empty or does not fit the model's inputs,
            NaN or infinity in an activation, or a tensor that was empty in every sample.
        ModelError: The model cannot be loaded.
    """
    if not 0 < rule.percentile <= 100:
        raise CalibrationError(f"percentile {rule.percentile} is outside (0, 100]")
    loaded = model if isinstance(model, ir.Model) else model_io.load(model)
    names = list(dict.fromkeys(tensor_names))
    find_values(loaded, names)
    observer = MinMax(names, threads) if rule.method is CalibMethod.MinMax else Counted(names, threads, rule)
    if elsewhere is not None:
        elsewhere.observe(observer, reader, max_samples, progress)
    else:
        observe_samples(
            observer, loaded, reader, max_samples=max_samples, progress=progress, decoding=decoding, memory=memory
        )
    return observer.ranges()


class MinMax:
    """Running minimum and maximum of scalars taken in the graph; of a part of an activation outside of it."""

    def __init__(self, names: Sequence[str], threads: int | None) -> None:
        self.names, self._threads = names, threads
        self.parts = Counted(names, threads, RangeRule())
        self.found = dict.fromkeys(names, (np.inf, -np.inf))

    def on(self, model: ir.Model, names: Sequence[str], kept: Sequence[str] = (), *, part: bool = False) -> Observation:
        """Open a model; a sample that hides something is run for the activations themselves."""
        session = observing_session(model, names, ("ReduceMin", "ReduceMax", "ReduceSum"), self._threads, kept)
        parts: list[Observation] = []

        def observe(sample: Sample) -> list[Any]:
            if sample.visible is not None:
                if not parts:
                    parts.append(self.parts.on(model, names, kept, part=part))
                return parts[0](sample)
            seen, handed = run_observing(session, sample, 3 * len(names), kept)
            if not sample.silent:
                self._take(names, np.array(seen, np.float64).reshape(len(names), 3), sample)
            return handed

        return observe

    def _take(self, names: Sequence[str], scalars: NDArray[np.float64], sample: Sample) -> None:
        """Take in minimum, maximum and sum of each activation."""
        low, high, total = scalars.T
        # An empty tensor gives min = +inf, max = -inf, sum = 0.
        bad = np.isnan(total) | (np.isinf(low) & ~(low > high)) | (np.isinf(high) & ~(low > high))
        if bad.any():
            raise not_finite(names[int(np.flatnonzero(bad)[0])], sample.number)
        for name, least, most in zip(names, low.tolist(), high.tolist(), strict=True):
            before = self.found[name]
            self.found[name] = (min(before[0], least), max(before[1], most))

    def merge(self, other: "MinMax") -> None:
        """Take in what another one saw."""
        for name, (least, most) in other.found.items():
            before = self.found[name]
            self.found[name] = (min(before[0], least), max(before[1], most))
        self.parts.merge(other.parts)

    def ranges(self) -> dict[str, Range]:
        """The ranges so far."""
        parts = self.parts.bounds()
        both = ((name, self.found[name], parts[name]) for name in self.names)
        return {name: _range(name, min(a[0], b[0]), max(a[1], b[1])) for name, a, b in both}


class Counted(Fetched):
    """Histograms of activations that are fetched group by group."""

    def __init__(self, names: Sequence[str], threads: int | None, rule: RangeRule) -> None:
        self.histograms = {name: LogHistogram() for name in names}
        self._rule = rule
        super().__init__(self.histograms, threads)

    def merge(self, other: "Counted") -> None:
        """Take in what another one saw."""
        for name, histogram in other.histograms.items():
            self.histograms[name].merge(histogram)

    def bounds(self) -> dict[str, tuple[float, float]]:
        """The bounds so far, from infinity down where nothing was seen."""
        return {
            name: (np.inf, -np.inf) if histogram.empty else self._rule.bounds(histogram)
            for name, histogram in self.histograms.items()
        }

    def ranges(self) -> dict[str, Range]:
        """The ranges so far."""
        return {name: _range(name, *bounds) for name, bounds in self.bounds().items()}


def _range(name: str, low: float, high: float) -> Range:
    if low > high:
        raise never_seen(name)
    return Range(float(low), float(high))
