"""Fixed scales of a cache, from its values over calibration samples.

They are taken from what the float model puts out as its cache: keys after RoPE and R3, values after R2.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.calibration.fetching import Fetched
from quarot_onnx.calibration.observing import observe_samples
from quarot_onnx.calibration.padding import Sample
from quarot_onnx.calibration.peaks import largest
from quarot_onnx.calibration.readers import DataReader, wrap
from quarot_onnx.config.choices import CacheScales
from quarot_onnx.config.kv_cache import FEW_BITS, CacheGrid
from quarot_onnx.errors import CalibrationError
from quarot_onnx.io import model_io
from quarot_onnx.kvcache.integers import Floats, rounded, scales_of
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.progress import Progress

_FACTORS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


@dataclass(frozen=True, eq=False)
class Observed:
    """What was seen of one cache.

    Attributes:
        peaks: max|x| of every channel, [heads, head_dim].
        sample: Some of its values, [heads, positions, head_dim]; empty where none are wanted.
    """

    peaks: NDArray[np.float64]
    sample: Floats


class _Taker:
    """Takes in a cache [batch, heads, positions, head_dim]."""

    def __init__(self, kept: int) -> None:
        """Keep so many positions of each run, evenly spaced, the first of all among them."""
        self._kept, self._parts = kept, list[Floats]()
        self._peaks: NDArray[np.float64] | None = None

    def add(self, values: Floats) -> bool:
        """Take in a cache; False where a value is not finite."""
        peaks = largest(values, (0, 2))
        self._peaks = peaks if self._peaks is None else np.maximum(self._peaks, peaks)
        if self._kept and values.shape[2]:
            step = -(-values.shape[2] // self._kept)
            self._parts.append(np.concatenate(list(values[:, :, ::step]), axis=1))
        return bool(np.isfinite(peaks).all())

    def found(self, name: str) -> Observed:
        """What was seen so far."""
        if self._peaks is None:
            raise CalibrationError(f"the cache {name!r} was empty in every sample: calibrate with longer samples")
        empty = np.zeros((*self._peaks.shape[:1], 0, *self._peaks.shape[1:]), np.float32)
        return Observed(self._peaks, np.concatenate([empty, *self._parts], axis=1))


def observe_caches(
    file: str | Path,
    names: list[str],
    reader: DataReader,
    *,
    kept: int = 0,
    max_samples: int | None = None,
    progress: Progress | None = None,
    memory: Memory = WHOLE,
) -> dict[str, Observed]:
    """Look at caches over calibration samples.

    Args:
        file: The float model.
        names: Outputs that hold a cache, [batch, heads, positions, head_dim].
        reader: Calibration data.
        kept: Positions of each sample whose values are kept.
        max_samples: Stop after so many samples; None for all.
        progress: Called after every sample.
        memory: Whether the model is run piece by piece.

    Returns:
        Output name to what was seen.

    Raises:
        CalibrationError: As for ``collect_ranges``.
    """
    model, takers = model_io.load(file), {name: _Taker(kept) for name in names}
    checked = wrap(reader)
    checked.rewind()
    fetched = Fetched(takers, counted=Sample.cached)
    observe_samples(fetched, model, checked, max_samples=max_samples, progress=progress, memory=memory)
    return {name: taker.found(name) for name, taker in takers.items()}


def fixed_scales(observed: Observed, grid: CacheGrid, scales: CacheScales) -> Floats:
    """The scales of one cache.

    The largest value, times the clip ratio, is the largest integer; but with few integers, and where no ratio was
    given, each scale is the one of several under which the kept values change least (mean squares).

    Args:
        observed: What was seen of it.
        grid: Its bits and its clip ratio.
        scales: CHANNEL, HEAD or TENSOR.

    Returns:
        [1, heads, 1, head_dim], [1, heads, 1, 1] or [1, 1, 1, 1].
    """
    bits, clip = grid.bits, grid.clip_ratio
    assert bits is not None, "or there is nothing to scale"
    axes = {CacheScales.CHANNEL: (), CacheScales.HEAD: (2,), CacheScales.TENSOR: (0, 2)}[scales]
    widest = observed.peaks[:, None, :].max(axis=axes, keepdims=True)
    if not observed.sample.size or clip != 1 or bits > FEW_BITS:
        return scales_of(widest, bits, clip)[None]
    best = scales_of(widest, bits, 1.0)
    least = _error(observed.sample, best, bits, axes)
    for factor in _FACTORS:
        tried = scales_of(widest, bits, factor)
        error = _error(observed.sample, tried, bits, axes)
        best, least = np.where(error < least, tried, best), np.minimum(error, least)
    return best[None]


def _error(sample: Floats, scales: Floats, bits: int, axes: tuple[int, ...]) -> NDArray[np.float64]:
    """The squared error of what shares a scale."""
    change = rounded(sample, scales, bits) * scales - sample
    return np.asarray(np.square(change, dtype=np.float64).sum(axis=(1, *axes), keepdims=True))
