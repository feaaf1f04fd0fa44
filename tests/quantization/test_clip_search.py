"""The clip search: bounds that hold, the choice of trying all factors, whatever is tried and on how many cores."""

import numpy as np
import pytest

from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.rounding import clip as clipping
from quarot_onnx.rounding.bounds import Family, cost_bounds
from quarot_onnx.rounding.clip import best_factors, shrink_factors
from quarot_onnx.rounding.grids import find_grid

Matrix = np.ndarray


def columns(rows: int, seed: int) -> Matrix:
    """Columns as they come: bulk and tails, skewed, spiked, of few values, on a grid, zero; float32 [rows, 40]."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, 40))
    weight[:, 5:10] **= 3
    weight[:, 10:15] = np.abs(weight[:, 10:15]) + rng.uniform(-1, 1, 5)
    weight[:, 15:20] *= 1e-3
    weight[0, 15:20] = [1.0, -1.0, 0.3, 5.0, -9.0]
    weight[:, 20:25] = rng.choice([-1.0, 0.0, 0.5], (rows, 5))
    weight[:, 25:30] = rng.integers(-8, 8, (rows, 5))
    weight[:, 30:33] = [0.0, 0.7, -0.7]
    return (weight * np.geomspace(1e-3, 1e3, 40)).astype(np.float32)


def in_steps(weight: Matrix, scheme: WeightScheme) -> tuple[Matrix, Matrix, Matrix]:
    """The scales at p = 1, and the limits."""
    grid = find_grid(weight.astype(np.float64), scheme, "w", clip=False)
    low = scheme.low - grid.zero_point[0].astype(np.float64)
    return grid.scale[0].astype(np.float64), low, low + scheme.high - scheme.low


def costs_by_hand(weight: Matrix, scale: Matrix, low: Matrix, high: Matrix) -> Matrix:
    """All costs, in float64: [factors, columns]."""
    exact = weight / scale
    return np.array([(np.abs(exact - p * np.clip(np.rint(exact / p), low, high)) ** 2.4).sum(axis=0) for p in FACTORS])


FACTORS = np.arange(100, 20, -1) / 100


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_no_factor_costs_less_than_its_bound(bits: int, rows: int, *, symmetric: bool) -> None:
    weight = columns(rows, bits)
    scale, low, high = in_steps(weight, WeightScheme(bits, symmetric=symmetric))
    costs = costs_by_hand(weight, scale, low, high)
    turned, low = np.ascontiguousarray(weight.T), low.astype(np.float32)
    factors = tuple(shrink_factors().tolist())
    bounds = cost_bounds(turned, 1 / scale, low, Family(1 << bits, factors, 2.4, len(factors))).T
    assert bounds.shape == costs.shape
    assert (bounds <= costs * (1 + 1e-4)).all()
    some = cost_bounds(turned, 1 / scale, low, Family(1 << bits, factors, 2.4, 30)).T
    assert some.shape == (31, 40)
    assert (some <= np.append(costs[:30], costs[30:].min(axis=0, keepdims=True), axis=0) * (1 + 1e-4)).all()
    if rows == 1000:  # And near it: most weights lie in cells without a kink.
        assert np.median(bounds[:, :5] / costs[:, :5]) > 0.95


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 31, 33, 257, 1000])
def test_the_choice_is_that_of_trying_all_factors(
    bits: int, rows: int, monkeypatch: pytest.MonkeyPatch, *, symmetric: bool
) -> None:
    weight = columns(rows, 10 + bits)
    scale, low, high = in_steps(weight, WeightScheme(bits, symmetric=symmetric))
    monkeypatch.setattr(clipping, "_STEP", 80)  # Nothing is left out.
    monkeypatch.setattr(clipping, "_NARROW", 0)
    plain = best_factors(weight, scale, low, high)
    costs = costs_by_hand(weight, scale, low, high)
    chosen = np.take_along_axis(costs, np.rint((1 - plain) * 100).astype(int)[None], 0)[0]
    # An element x, of 2^bits at most, is off by two roundings to float32, and so is its error e: Σ(e + η)^2.4 - Σ e^2.4
    # is 2.4 η Σ e^1.4 at most, but for η^2.4; the sum is that of a power mean. Both of two costs are off by that.
    least, eta = costs.min(axis=0), 2.0**bits * 2.0**-23
    off = 2.4 * eta * rows ** (1 / 2.4) * least ** (1.4 / 2.4) + rows * (2 * eta) ** 2.4
    assert (chosen <= least * (1 + 1e-5) + 2 * off).all()
    monkeypatch.setattr(clipping, "_STEP", 6)
    for narrow in (0, 32):
        monkeypatch.setattr(clipping, "_NARROW", narrow)
        monkeypatch.setattr(clipping, "_SHARED", 0)
        for tile, likely in ((1, 80), (3 * rows, 39), (1 << 15, 10)):
            monkeypatch.setattr(clipping, "_TILE", tile)
            monkeypatch.setattr(clipping, "_LIKELY", likely)
            assert (best_factors(weight, scale, low, high) == plain).all()


@pytest.mark.parametrize("power", [-105, 100])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_near_the_ends_of_float32(bits: int, power: int) -> None:
    """Whose reciprocals, in units of finer nodes, it does not hold."""
    weight = np.random.default_rng(7).standard_normal((100, 40)).astype(np.float32)
    factors = [
        best_factors(scaled, *in_steps(scaled, WeightScheme(bits)))
        for scaled in (weight, weight * np.float32(2.0**power))
    ]
    assert len(np.unique(factors[0])) > 1
    assert (factors[0] == factors[1]).all()


@pytest.mark.parametrize("rows", [128, 600, 2000])
def test_few_factors_are_tried(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((rows, 300)).astype(np.float32)
    tried, whole = 0, clipping._Tile.costs

    def counted(tile: clipping._Tile, numbers: np.ndarray) -> np.ndarray:
        nonlocal tried
        tried += len(numbers)
        return whole(tile, numbers)

    monkeypatch.setattr(clipping._Tile, "costs", counted)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    find_grid(weight, WeightScheme(4), "w", clip=True)
    assert tried < 3 * 300


@pytest.mark.parametrize("bits", [4, 8])
def test_of_equal_costs_the_first_is_taken(bits: int) -> None:
    # All of them cost nothing; or p = 1 and p = 0.5 do.
    scale, low = np.ones(2), np.full(2, -float(1 << (bits - 1)))
    weight = np.zeros((200, 2), np.float32)
    weight[::2, 1], weight[1::2, 1] = 1.0, -1.0
    assert (best_factors(weight, scale, low, -low - 1) == 1.0).all()


@pytest.mark.parametrize("scheme", [WeightScheme(4), WeightScheme(4, symmetric=False), WeightScheme(8)])
def test_the_number_of_threads_changes_nothing(scheme: WeightScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.tile(columns(100, 3), 40)  # Five tiles.
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        found.append(find_grid(weight, scheme, "w", clip=True).scale)
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()


def test_what_goes_wrong_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    weight, scale = np.ones((100, 4000), np.float32), np.ones(4000)
    with pytest.raises(ValueError, match="broadcast"):
        best_factors(weight, scale[:3000], -scale, scale)
