"""Fixed scales of a cache: max|x| of every channel of every KV head, over calibration samples.

They are taken from what the float model puts out as its cache: keys after RoPE and R3, values after R2.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.calibration.observing import Fetched, observe_samples
from quarot_onnx.calibration.readers import DataReader, wrap
from quarot_onnx.config.choices import CacheScales
from quarot_onnx.config.kv_cache import KVCacheConfig
from quarot_onnx.errors import CalibrationError
from quarot_onnx.io import model_io
from quarot_onnx.kvcache.integers import Floats, scales_of
from quarot_onnx.progress import Progress


class _Peaks:
    """max|x| of every channel of a cache [batch, heads, positions, head_dim]."""

    def __init__(self) -> None:
        self.found: NDArray[np.float64] | None = None

    def add(self, values: NDArray[np.float32]) -> bool:
        """Take in a cache; False where a value is not finite."""
        peaks = np.maximum(values.max(axis=(0, 2), initial=0), -values.min(axis=(0, 2), initial=0)).astype(np.float64)
        self.found = peaks if self.found is None else np.maximum(self.found, peaks)
        return bool(np.isfinite(peaks).all())


def cache_peaks(
    file: str | Path,
    names: list[str],
    reader: DataReader,
    *,
    max_samples: int | None = None,
    progress: Progress | None = None,
) -> dict[str, NDArray[np.float64]]:
    """max|x| of every channel of caches.

    Args:
        file: The float model.
        names: Outputs that hold a cache, [batch, heads, positions, head_dim].
        reader: Calibration data.
        max_samples: Stop after so many samples; None for all.
        progress: Called after every sample.

    Returns:
        Output name to peaks, [heads, head_dim].

    Raises:
        CalibrationError: As for ``collect_ranges``.
    """
    model, takers = model_io.load(file), {name: _Peaks() for name in names}
    checked = wrap(reader)
    checked.rewind()
    observe_samples(Fetched(model, takers, None), model, checked, max_samples=max_samples, progress=progress)
    peaks = {}
    for name, taker in takers.items():
        if taker.found is None:
            raise CalibrationError(f"the cache {name!r} was empty in every sample: calibrate with longer samples")
        peaks[name] = taker.found
    return peaks


def fixed_scales(peaks: NDArray[np.float64], config: KVCacheConfig, *, keys: bool, scales: CacheScales) -> Floats:
    """The scales of one cache.

    Args:
        peaks: [heads, head_dim].
        config: Its bits and clip ratios.
        keys: Whether it holds keys.
        scales: CHANNEL, HEAD or TENSOR.

    Returns:
        [1, heads, 1, head_dim], [1, heads, 1, 1] or [1, 1, 1, 1].
    """
    bits, clip = (config.k_bits, config.k_clip_ratio) if keys else (config.v_bits, config.v_clip_ratio)
    assert bits is not None, "or there is nothing to scale"
    axes = {CacheScales.CHANNEL: (), CacheScales.HEAD: (1,), CacheScales.TENSOR: (0, 1)}[scales]
    shared = peaks.max(axis=axes, keepdims=True)[None, :, None, :]
    return scales_of(shared, bits, clip)
