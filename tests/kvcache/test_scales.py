"""Fixed scales of a cache: the largest value is the largest integer, or, of 4 bits, what changes the values least."""

import numpy as np
import pytest

from quarot_onnx import KVCacheConfig
from quarot_onnx.config.choices import CacheScales
from quarot_onnx.kvcache.integers import rounded, scales_of, stored
from quarot_onnx.kvcache.scales import Observed, fixed_scales

AXES = {CacheScales.CHANNEL: (1,), CacheScales.HEAD: (1, 2), CacheScales.TENSOR: (0, 1, 2)}


def observed(seed: int = 0) -> Observed:
    """Two heads of eight channels, with a few values far out."""
    sample = np.random.default_rng(seed).standard_t(2, (2, 200, 8)).astype(np.float32)
    return Observed(np.abs(sample).max(axis=1).astype(np.float64), sample)


@pytest.mark.parametrize("scales", AXES)
def test_eight_bits_hold_the_largest_value(scales: CacheScales) -> None:
    seen = observed()
    found = fixed_scales(seen, KVCacheConfig(8, 8).grid(keys=True), scales)
    want = np.abs(seen.sample).max(axis=AXES[scales], keepdims=True)[None] / 127
    np.testing.assert_allclose(np.broadcast_to(found, (1, 2, 1, 8)), np.broadcast_to(want, (1, 2, 1, 8)), rtol=1e-6)


@pytest.mark.parametrize("scales", AXES)
def test_four_bits_cut_off_where_that_pays(scales: CacheScales) -> None:
    seen = observed()

    def error(own: np.ndarray) -> np.ndarray:
        change = rounded(seen.sample, own[0], 4) * own[0] - seen.sample
        return np.square(change, dtype=np.float64).sum(axis=AXES[scales])

    found = fixed_scales(seen, KVCacheConfig(4, 4).grid(keys=False), scales)
    widest = scales_of(np.abs(seen.sample).max(axis=AXES[scales], keepdims=True), 4, 1.0)[None]
    assert (error(found) <= error(widest)).all()
    assert (error(found) < error(widest)).any()
    for factor in (0.9, 0.6, 0.3):  # some of those that are tried
        assert (error(found) <= error(widest * np.float32(factor)) * (1 + 1e-6)).all()
    asked = fixed_scales(seen, KVCacheConfig(4, 4, v_clip_ratio=0.5).grid(keys=False), scales)
    np.testing.assert_allclose(asked, widest * 0.5, rtol=1e-6)


def test_zeros_and_dead_channels() -> None:
    sample = np.zeros((2, 5, 8), np.float32)
    found = fixed_scales(Observed(np.zeros((2, 8)), sample), KVCacheConfig(4, 4).grid(keys=True), CacheScales.CHANNEL)
    assert (found == 1).all()
    assert (rounded(sample, found[0], 4) == 0).all()


def test_two_in_a_byte() -> None:
    x = np.arange(-8, 8, dtype=np.float32)
    bytes_ = stored(x, np.float32(1), 4)
    low, high = (bytes_ & 15).astype(int) - 8, (bytes_ >> 4).astype(int) - 8
    np.testing.assert_array_equal(low, x[::2])
    np.testing.assert_array_equal(high, x[1::2])
    np.testing.assert_array_equal(stored(x, np.float32(1), 8), x.astype(np.int8))
