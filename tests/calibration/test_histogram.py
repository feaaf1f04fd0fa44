import numpy as np
import pytest

from quarot_onnx.calibration.histogram import LogHistogram

RESOLUTION = 2.0**-8  # a bin's edges, relative: eight bits of the mantissa


def filled(*parts: np.ndarray) -> LogHistogram:
    histogram = LogHistogram()
    for part in parts:
        assert histogram.add(part.astype(np.float32))
    return histogram


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_bounds_are_the_quantiles_rounded_outwards(percentile: float, scale: float):
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(50_000) ** 3 * scale).astype(np.float32)
    low, high = filled(values[:100], values[100:]).central(percentile)
    cut = (100 - percentile) / 200
    want_low = np.quantile(values, cut, method="inverted_cdf")
    want_high = np.quantile(values, 1 - cut, method="inverted_cdf")
    assert want_low * (1 + 2 * RESOLUTION) <= low <= want_low
    assert want_high <= high <= want_high * (1 + 2 * RESOLUTION)


def test_an_outlier_does_not_coarsen_the_rest():
    values = np.linspace(-1, 1, 100_001, dtype=np.float32)
    spiked = np.append(values, np.float32(1e6))
    assert filled(spiked).central(99.0)[1] == pytest.approx(0.99, rel=2 * RESOLUTION)


def test_everything_is_the_minimum_and_maximum():
    assert filled(np.array([-3.3, 0.0, 7.7])).central(100.0) == (np.float32(-3.3), np.float32(7.7))
    assert filled(np.array([2.5, 2.5])).central(50.0) == (2.5, 2.5)
    assert filled(np.zeros(4)).central(99.0) == (0.0, 0.0)
    assert filled(np.array([-1e30, 1e30])).central(100.0) == (np.float32(-1e30), np.float32(1e30))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_told(bad: float):
    assert not LogHistogram().add(np.array([1.0, bad], np.float32))


def test_empty():
    histogram = LogHistogram()
    assert histogram.add(np.zeros((0, 3), np.float32))
    assert histogram.empty
