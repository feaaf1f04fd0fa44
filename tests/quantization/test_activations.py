"""Fake quantization in NumPy against the formulas, element by element."""

from typing import Any

import numpy as np
import pytest

from quarot_onnx.quantization.activations import (
    Activation,
    FakePerToken,
    FakeStatic,
    PerToken,
    Static,
    fake_quantize,
    per_token,
    round_trip,
    static,
)
from quarot_onnx.quantization.grids import Grid


def sample(*shape: int) -> np.ndarray:
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32) + np.float32(0.3)
    x *= np.geomspace(1e-3, 1e3, shape[-2], dtype=np.float32)[:, None]
    return x


def slow(x: np.ndarray, bits: int, symmetric: bool, clip: float) -> np.ndarray:
    """The formulas on one group, in float64, a number at a time."""
    values = [float(v) for v in x]
    if symmetric:
        top = 2 ** (bits - 1) - 1
        s = clip * max(abs(v) for v in values) / top
        return np.array([s * min(max(round(v / s), -top - 1), top) for v in values])
    top = 2**bits - 1
    low, high = clip * min(*values, 0.0), clip * max(*values, 0.0)
    s = (high - low) / top
    z = round(-low / s)
    return np.array([s * (min(max(round(v / s) + z, 0), top) - z) for v in values])


@pytest.mark.parametrize("clip", [1.0, 0.7])
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fake_quantization_is_its_formula(bits: int, symmetric: bool, group: int | None, clip: float) -> None:
    x = sample(2, 5, 12)
    size = group or 12
    expected = np.stack([slow(g, bits, symmetric, clip) for g in x.reshape(-1, size)]).reshape(x.shape)
    actual = fake_quantize(x, bits, symmetric=symmetric, group_size=group, clip_ratio=clip)
    assert actual.dtype == np.float32
    # The sample has no ties (a seed of this kind has none); float32 arithmetic: three roundings of 6e-8 each.
    np.testing.assert_allclose(actual, expected, rtol=5e-7, atol=0)
    assert len({round(float(v), 5) for v in actual[0, 4, :size]}) <= 2**bits
    assert not np.array_equal(actual, x)


@pytest.mark.parametrize("low_only", [1, -1])
def test_asymmetric_grids_hold_zero_and_both_signs_of_rows(low_only: int) -> None:
    x = np.abs(sample(3, 8)) * np.float32(low_only) + np.float32(low_only)
    actual = fake_quantize(x, 8, symmetric=False)
    np.testing.assert_allclose(actual, x, atol=float(np.abs(x).max()) / 255)


@pytest.mark.parametrize("clip", [1.0, 0.7])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_one_grid_for_the_tensor_is_the_same_formula(bits: int, symmetric: bool, clip: float) -> None:
    x = sample(2, 5, 12)
    kind = FakeStatic.for_range(float(x.min()) * clip, float(x.max()) * clip, bits, symmetric=symmetric)
    actual = round_trip(x, kind)
    assert actual.dtype == np.float32
    # As above: no ties, three roundings of 6e-8 each, here on the scale, the quotient and the product.
    np.testing.assert_allclose(actual, slow(x.ravel(), bits, symmetric, clip).reshape(x.shape), rtol=5e-7, atol=0)
    assert 2 <= len(np.unique(actual)) <= 2**bits
    assert len(np.unique(x)) > 2**bits or bits > 6


def test_grids_of_a_range_by_hand() -> None:
    assert FakeStatic.for_range(-3.0, 14.0, 4, symmetric=True) == FakeStatic(4, scale=2.0)
    assert FakeStatic.for_range(-15.0, 30.0, 4, symmetric=False) == FakeStatic(
        4, symmetric=False, scale=3.0, zero_point=5
    )
    # The range is widened to hold 0.
    assert FakeStatic.for_range(15.0, 30.0, 4, symmetric=False) == FakeStatic(4, symmetric=False, scale=2.0)
    assert FakeStatic.for_range(-6.0, -3.0, 2, symmetric=False) == FakeStatic(
        2, symmetric=False, scale=2.0, zero_point=3
    )
    for symmetric in (True, False):
        assert FakeStatic.for_range(0.0, 0.0, 3, symmetric=symmetric) == FakeStatic(3, symmetric, scale=1.0)


def test_what_lies_beyond_one_grid_saturates() -> None:
    x = np.array([-1000, -0.6, -0.25, 0, 0.3, 1000], np.float32)
    np.testing.assert_array_equal(round_trip(x, FakeStatic(3, scale=0.5)), np.array([-2, -0.5, 0, 0, 0.5, 1.5], "f"))
    shifted = FakeStatic(3, symmetric=False, scale=0.5, zero_point=1)
    np.testing.assert_array_equal(round_trip(x, shifted), np.array([-0.5, -0.5, 0, 0, 0.5, 3], "f"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 1},
        {"bits": 17},
        {"scale": 0.0},
        {"scale": 0.1},  # no float32
        {"zero_point": 1},
        {"symmetric": False, "zero_point": 16},
        {"symmetric": False, "zero_point": -1},
    ],
)
def test_grids_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        FakeStatic(**{"bits": 4, "scale": 0.5} | wrong)


def test_rows_of_zeros_stay_zeros() -> None:
    x = sample(3, 8)
    x[1] = 0
    kinds = [PerToken(), FakePerToken(4), FakePerToken(4, symmetric=False), FakePerToken(3, group_size=4)]
    kinds += [FakeStatic(4, scale=0.125), FakeStatic(4, symmetric=False, scale=0.125, zero_point=7)]
    for kind in kinds:
        actual = round_trip(x, kind)
        assert not actual[1].any()
        assert actual[2].any()


@pytest.mark.parametrize("clip", [1.0, 0.8])
def test_eight_bits_per_token(clip: float) -> None:
    x = sample(4, 16)
    amax = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64) * clip
    expected = amax / 127 * np.clip(np.rint(x / amax * 127), -128, 127)
    np.testing.assert_allclose(per_token(x, clip), expected, rtol=5e-7)


def test_fixed_grids_saturate() -> None:
    grid = Grid(np.array(0.5, np.float32), np.array(-3, np.int8))
    x = np.array([-1000, -0.3, 0, 0.25, 0.75, 1000], np.float32)
    np.testing.assert_array_equal(static(x, grid), np.array([-62.5, -0.5, 0, 0, 1, 65], np.float32))


def test_what_is_left_alone_and_what_callers_must_keep() -> None:
    x = sample(2, 6)
    assert round_trip(x, None) is x
    kinds: list[Activation] = [PerToken(), Static(Grid(np.float32(0.1), np.uint8(128))), FakePerToken(4)]
    kinds += [FakeStatic(4, scale=0.5), FakeStatic(4, symmetric=False, scale=0.5, zero_point=3)]
    before = x.copy()
    for kind in kinds:
        round_trip(x, kind)
    np.testing.assert_array_equal(x, before)
    with pytest.raises(AssertionError):
        fake_quantize(x, 4, symmetric=True, group_size=4)
