"""The part of a range that a grid covers: against the values themselves, and against every candidate."""

import numpy as np
import pytest

from quarot_onnx.calibration.clipping import candidates
from quarot_onnx.calibration.histogram import LogHistogram
from quarot_onnx.calibration.ranges import Range, RangeRule
from quarot_onnx.config.enums import CalibMethod
from quarot_onnx.quantization.activations import FakeStatic, round_trip
from quarot_onnx.quantization.grids import IntegerType, grid_for_range
from quarot_onnx.quantization.serving import SampledRows


def counted(values: np.ndarray) -> LogHistogram:
    histogram = LogHistogram()
    assert histogram.add(values.astype(np.float32))
    return histogram


def rounded(values: np.ndarray, low: float, high: float, bits: int, *, symmetric: bool = False) -> np.ndarray:
    integers = IntegerType(signed=False, bits=8)
    grid = grid_for_range(np.asarray(low), np.asarray(high), integers, symmetric=symmetric)
    scale, zero, top = float(grid.scale) * 255 / (2**bits - 1), 0.0, 2**bits - 1
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(values / scale) + zero, 0, top) - zero) * scale


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outlier", [0, 8, 100])
def test_the_squared_error_is_the_least_of_all_candidates(bits: int, outlier: float) -> None:
    values = np.random.default_rng(0).standard_normal(20_000)
    values[0] = outlier or values[0]
    low, high = RangeRule(CalibMethod.MinMSE, bits=bits).bounds(counted(values))
    parts = candidates(values.min(), values.max())
    assert parts[0] == (values.min(), values.max())
    errors = [np.square(rounded(values, *part, bits) - values).sum() for part in parts]
    found = np.square(rounded(values, low, high, bits) - values).sum()
    # The zero point of a range that is cut on both sides lies between two integers: either may be taken.
    assert found <= 1.05 * min(errors)
    if outlier == 100 and bits == 4:
        assert high < 30  # the outlier is let go


def test_a_symmetric_range_stays_symmetric() -> None:
    values = np.random.default_rng(0).standard_normal(5000) + 1
    for method in (CalibMethod.MinMSE, CalibMethod.Entropy):
        low, high = RangeRule(method, symmetric=True).bounds(counted(values))
        assert low == -high


def test_entropy_keeps_a_bounded_range_and_lets_go_of_a_lonely_value() -> None:
    rng = np.random.default_rng(0)
    low, high = RangeRule(CalibMethod.Entropy).bounds(counted(rng.uniform(-1, 1, 50_000)))
    assert low == pytest.approx(-1, rel=0.2)
    assert high == pytest.approx(1, rel=0.2)
    spiked = np.append(rng.standard_normal(50_000), 1e4)
    low, high = RangeRule(CalibMethod.Entropy).bounds(counted(spiked))
    assert high < 100


def test_auto_serves_the_linears() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 16)).astype(np.float32)
    x[0, 3] = 4000
    taker = SampledRows()
    assert taker.add(x[:100])
    assert taker.add(x[100:])
    assert taker.count == 4000
    assert taker.largest is not None
    assert taker.largest.max() == 4000
    rule = RangeRule(CalibMethod.Auto)
    deaf, weight = np.ones((16, 8), np.float32), np.ones((16, 8), np.float32)
    deaf[3] = 0  # nobody reads the outlier's channel
    assert taker.best(rule, [lambda: deaf]).max < 100
    loud = weight.copy()
    loud[3] = 1e3  # cutting it off would be ruinous
    assert taker.best(rule, [lambda: loud]) == Range(float(x.min()), 4000.0)


def test_what_is_not_finite_is_told() -> None:
    assert not SampledRows().add(np.array([[1.0, np.nan]], np.float32))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 7])
def test_few_bits_find_the_range_that_serves_best(bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal((400, 16)).astype(np.float32)
    values[5, 0] = 200  # nothing reads it
    weight = rng.standard_normal((16, 4)).astype(np.float32)
    weight[0] = 0
    rows = SampledRows()
    assert rows.add(values)
    found = rows.best(RangeRule(CalibMethod.Auto, bits=bits, symmetric=symmetric), [lambda: weight])

    def error(low: float, high: float) -> float:
        kind = FakeStatic.for_range(low, high, bits, symmetric=symmetric)
        return float(np.square((round_trip(values, kind) - values) @ weight).sum())

    assert error(found.min, found.max) < error(float(values.min()), float(values.max())) / 2
