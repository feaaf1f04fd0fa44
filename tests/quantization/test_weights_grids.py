"""Grids of weights: ranges met, zero exact, the clip search against a direct transcription, rounding to nearest."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from weights_by_hand import clipped_scale

from quarot_onnx.errors import ModelError
from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.rounding import clip as clipping
from quarot_onnx.rounding.clip import shrink_factors
from quarot_onnx.rounding.grids import find_grid
from quarot_onnx.rounding.rtn import round_to_nearest_weight

SCHEMES = st.builds(
    WeightScheme,
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    signed=st.booleans(),
    group_size=st.sampled_from([None, 1, 3, 4]),
)
VALUES = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=True)
WEIGHTS = arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 5)), elements=VALUES)


def gaussian(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@settings(deadline=None)
@given(weight=WEIGHTS, scheme=SCHEMES)
def test_without_clipping_every_weight_is_within_half_a_step_and_zero_is_exact(
    weight: np.ndarray, scheme: WeightScheme
) -> None:
    rounded = round_to_nearest_weight(weight, scheme, "w", clip=False)
    assert rounded.integers.dtype == rounded.zero_point.dtype == np.dtype(scheme.dtype)
    assert rounded.scale.dtype == np.float32
    assert rounded.scale.shape == rounded.zero_point.shape == (scheme.groups(len(weight)), weight.shape[1])
    for integers in (rounded.integers, rounded.zero_point):
        assert scheme.low <= integers.min()
        assert integers.max() <= scheme.high
    if scheme.symmetric:
        assert (rounded.zero_point == scheme.middle).all()
    step = np.repeat(rounded.scale, scheme.group_size or len(weight), axis=0)[: len(weight)].astype(np.float64)
    error = np.abs(rounded.dequantized().astype(np.float64) - weight)
    # The scale and the dequantized value are rounded to float32; an asymmetric end may lose half a step with its zero.
    rounding = 2.0**-23 * np.abs(weight).astype(np.float64)
    assert (error <= step * (0.5 if scheme.symmetric else 1.0) + rounding).all()
    assert (rounded.dequantized()[weight == 0.0] == 0.0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_weight_of_a_symmetric_grid_is_met(bits: int) -> None:
    weight = gaussian(33, 7)
    found = round_to_nearest_weight(weight, WeightScheme(bits), "w", clip=False)
    largest = np.abs(weight).argmax(axis=0), np.arange(7)
    assert (np.abs(found.integers[largest].astype(int)) == 2 ** (bits - 1) - 1).all()
    np.testing.assert_allclose(found.dequantized()[largest], weight[largest], rtol=2.0**-22)


@pytest.mark.parametrize("signed", [True, False])
def test_signed_and_unsigned_differ_by_the_middle(*, signed: bool) -> None:
    weight = gaussian(40, 6) + 0.3
    for symmetric in (True, False):
        one = round_to_nearest_weight(weight, WeightScheme(4, symmetric=symmetric, signed=signed), "w", clip=True)
        other = round_to_nearest_weight(weight, WeightScheme(4, symmetric=symmetric), "w", clip=True)
        assert (one.scale == other.scale).all()
        shift = 0 if signed else 8
        assert (one.integers.astype(int) - shift == other.integers).all()
        assert (one.zero_point.astype(int) - shift == other.zero_point).all()


def test_the_integers_are_those_of_the_float32_scale() -> None:
    # Weights next to the middle between two integers: the exact scale and its float32 value take them apart.
    weight = np.concatenate([np.arange(0.5, 7.0), [7.0]])[:, None] * np.geomspace(0.1, 1.7, 301)[None]
    for clip in (False, True):
        found = round_to_nearest_weight(weight.astype(np.float32), WeightScheme(4), "w", clip=clip)
        expected = np.rint(weight.astype(np.float32).astype(np.float64) / found.scale.astype(np.float64))
        assert (found.integers == np.clip(expected, -8, 7)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "rows"), [(None, 300), (64, 150)])
def test_the_clip_search_finds_what_trying_all_factors_finds(
    bits: int, *, symmetric: bool, group_size: int | None, rows: int
) -> None:
    weight = gaussian(rows, 11) ** 3 * np.geomspace(1e-3, 1e3, 11, dtype=np.float32) + np.float32(0.1)
    scheme = WeightScheme(bits, symmetric=symmetric, group_size=group_size)
    grid = find_grid(weight, scheme, "w", clip=True)
    size = group_size or rows
    for group in range(scheme.groups(rows)):
        for column in range(11):
            values = weight[group * size : (group + 1) * size, column].astype(np.float64)
            scale, zero, errors = clipped_scale(values, scheme, clip=True)
            assert grid.zero_point[group, column] == zero
            ranks = grid.scale[group, column] / scale
            if abs(ranks - 1) > 1e-6:  # Another factor: allowed where its error is the same to float32's precision.
                number = round((1 - ranks * (1 - errors.argmin() / 100)) * 100)
                assert errors[number] <= errors.min() * (1 + 2e-5)


def test_the_factors_that_are_tried() -> None:
    np.testing.assert_allclose(shrink_factors(), np.arange(100, 20, -1) / 100, rtol=1e-15)


def test_the_clip_search_clips_and_helps() -> None:
    weight = gaussian(1000, 8)
    found = round_to_nearest_weight(weight, WeightScheme(4), "w", clip=True)
    plain = round_to_nearest_weight(weight, WeightScheme(4), "w", clip=False)
    assert (found.scale < 0.9 * plain.scale).all()
    assert (found.scale >= 0.2 * plain.scale).all()
    wrong, worse = (np.abs(weight - rounded.dequantized()).sum(axis=0) for rounded in (found, plain))
    assert (wrong < worse).all()


@pytest.mark.parametrize(("norm", "finer"), [(2.0, True), (8.0, False)])
def test_the_norm_counts(norm: float, *, finer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(500, 5) ** 3
    usual = find_grid(weight, WeightScheme(3), "w", clip=True).scale
    monkeypatch.setattr(clipping, "_NORM", norm)
    assert ((find_grid(weight, WeightScheme(3), "w", clip=True).scale < usual) == finer).all()


def test_columns_do_not_know_of_each_other() -> None:
    weight = gaussian(200, 700)
    whole = find_grid(weight, WeightScheme(4), "w", clip=True)
    alone = find_grid(weight[:, 300:301], WeightScheme(4), "w", clip=True)
    np.testing.assert_allclose(whole.scale[:, 300:301], alone.scale, rtol=1e-6)


def test_one_scale_for_the_whole_matrix() -> None:
    weight = gaussian(70, 9) * np.linspace(0.1, 2, 9, dtype=np.float32)
    scheme = WeightScheme(4, symmetric=False, per_channel=False)
    for clip in (False, True):
        found = round_to_nearest_weight(weight, scheme, "w", clip=clip)
        assert found.scale.shape == found.zero_point.shape == (1, 1)
        as_column = round_to_nearest_weight(weight.reshape(-1, 1), WeightScheme(4, symmetric=False), "w", clip=clip)
        assert found.scale == as_column.scale
        assert (found.integers.reshape(-1, 1) == as_column.integers).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [False, True])
def test_constant_zero_and_tiny_columns(*, symmetric: bool, clip: bool) -> None:
    weight = np.zeros((12, 5), np.float32)
    weight[:, 1], weight[:, 2], weight[:, 3], weight[3, 4] = 0.7, -0.7, 1e-42, 5.0
    found = round_to_nearest_weight(weight, WeightScheme(4, symmetric=symmetric), "w", clip=clip)
    assert found.scale[0, 0] == found.scale[0, 3] == 1.0
    np.testing.assert_allclose(found.dequantized(), weight, rtol=1e-6, atol=1e-41)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", [WeightScheme(4), WeightScheme(4, per_channel=False), WeightScheme(4, group_size=2)])
def test_nan_and_infinity_are_refused_by_name(bad: float, scheme: WeightScheme) -> None:
    weight = gaussian(6, 4)
    weight[3, 2] = bad
    with pytest.raises(ModelError, match=r"'model/layers\.3/q_proj' holds NaN or infinity"):
        round_to_nearest_weight(weight, scheme, "model/layers.3/q_proj", clip=False)


def test_half_precision_weights_round_as_their_float32_values() -> None:
    weight = gaussian(50, 6).astype(np.float16)
    half = round_to_nearest_weight(weight, WeightScheme(4), "w", clip=True)
    single = round_to_nearest_weight(weight.astype(np.float32), WeightScheme(4), "w", clip=True)
    assert (half.integers == single.integers).all()
    assert (half.scale == single.scale).all()


@pytest.mark.parametrize("group_size", [None, 64])
def test_a_large_weight_is_rounded_in_blocks_like_a_small_one(group_size: int | None) -> None:
    weight = gaussian(500, 2000)  # four blocks of 2^18
    found = round_to_nearest_weight(weight, WeightScheme(8, group_size=group_size), "w", clip=False)
    scale = np.repeat(found.scale, group_size or 500, axis=0)[:500].astype(np.float64)
    np.testing.assert_array_equal(found.integers, np.rint(weight / scale))
