"""The largest magnitude of every channel of activations over calibration samples."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.calibration.fetching import Fetched
from quarot_onnx.calibration.observing import find_values, observe_samples
from quarot_onnx.calibration.readers import DataReader
from quarot_onnx.calibration.sample import never_seen
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.progress import Progress


def largest(values: NDArray[np.float32], axes: tuple[int, ...]) -> NDArray[np.float64]:
    """max|x| over axes, without a copy of x; 0 where there is nothing, NaN where one is."""
    peaks: NDArray[np.float32] = np.maximum(values.max(axis=axes, initial=0), -values.min(axis=axes, initial=0))
    return peaks.astype(np.float64)


class _Peaks:
    """max|x| along the last axis."""

    def __init__(self) -> None:
        self.found: NDArray[np.float64] | None = None

    def add(self, values: NDArray[np.float32]) -> bool:
        """Take in rows [..., channels]; False where a value is not finite."""
        peaks = largest(values, tuple(range(values.ndim - 1)))
        self.found = peaks if self.found is None else np.maximum(self.found, peaks)
        return bool(np.isfinite(peaks).all())


def collect_peaks(
    model: str | Path,
    tensor_names: Sequence[str],
    reader: DataReader,
    *,
    max_samples: int | None = None,
    progress: Progress | None = None,
    memory: Memory = WHOLE,
) -> dict[str, NDArray[np.float64]]:
    """max|x_j| of activations over the samples of a reader.

    Args:
        model: The ONNX file.
        tensor_names: Graph inputs or node outputs, float, channels along the last axis.
        reader: Any calibration reader; samples may differ in length.
        max_samples: Stop after so many samples; None for all.
        progress: Called after every sample.
        memory: Whether the model is run piece by piece.

    Returns:
        Tensor name to peaks, [channels].

    Raises:
        CalibrationError: As for ``collect_ranges``.
        ModelError: The model cannot be loaded.
    """
    loaded, names = model_io.load(model), list(dict.fromkeys(tensor_names))
    find_values(loaded, names)
    takers = {name: _Peaks() for name in names}
    observe_samples(Fetched(takers), loaded, reader, max_samples=max_samples, progress=progress, memory=memory)
    peaks = {}
    for name, taker in takers.items():
        if taker.found is None:
            raise never_seen(name)
        peaks[name] = taker.found
    return peaks
