"""Grids and integers: onnxruntime's own grids, half a step of error at most, zero exact."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto
from onnxruntime.quantization.quant_utils import compute_scale_zp, get_qmin_qmax_for_qType

from quarot_onnx.errors import ModelError
from quarot_onnx.quantization.grids import IntegerType, grid_for_range, round_to_nearest, weight_grid

INT8, UINT8 = IntegerType(signed=True), IntegerType(signed=False)
KINDS = {"int8": (INT8, TensorProto.INT8), "uint8": (UINT8, TensorProto.UINT8)}
FINITE = st.floats(-1e6, 1e6, width=32)
SUBTRACTS_EXACTLY = compute_scale_zp(
    np.array(-1.0, np.float32),
    np.array(0.03641583397984505, np.float32),
    np.array(0, np.uint8),
    np.array(255, np.uint8),
)[1] == np.float32((1.0 + 0.03641583397984505) / 255)
"""Older versions of onnxruntime take max - min in float32: where that rounds, the scale is off by its last digit."""
ENDS = FINITE if SUBTRACTS_EXACTLY else st.floats(-60000, 60000, width=16)
WEIGHTS = arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 5)), elements=FINITE)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@given(low=ENDS, high=ENDS)
def test_the_grid_of_a_range_is_that_of_onnxruntime(kind: str, *, symmetric: bool, low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    assume(SUBTRACTS_EXACTLY or np.float32(max(high, 0)) - np.float32(min(low, 0)) == max(high, 0) - min(low, 0))
    integers, onnx_type = KINDS[kind]
    grid = grid_for_range(np.array(low), np.array(high), integers, symmetric=symmetric)
    q_min, q_max = get_qmin_qmax_for_qType(onnx_type, symmetric=symmetric)
    zero, scale = compute_scale_zp(
        np.array(low, np.float32), np.array(high, np.float32), q_min, q_max, symmetric=symmetric
    )
    assert grid.scale == scale
    assert grid.scale.dtype == np.float32
    assert grid.zero_point == zero
    assert grid.zero_point.dtype == np.dtype(kind)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@given(weight=WEIGHTS)
def test_rounding_is_half_a_step_off_at_most(kind: str, *, symmetric: bool, per_channel: bool, weight) -> None:
    grid = weight_grid(weight, KINDS[kind][0], symmetric=symmetric, per_channel=per_channel, name="W")
    assert grid.scale.shape == ((weight.shape[1],) if per_channel else ())
    integers = round_to_nearest(weight, grid)
    scale = grid.scale.astype(np.float64)
    back = (integers.astype(np.float64) - grid.zero_point) * scale
    # Half a step for rounding, half for an end that moves with the rounded zero point; uint8 symmetric lacks the
    # topmost half step. Scales are float32: 2^-24 relative on 255 steps.
    allowed = (0.5 if kind == "int8" and symmetric else 1.0) + 255 * 2.0**-23
    assert (np.abs(back - weight) <= allowed * scale).all()
    assert (back[weight == 0] == 0).all()
    if symmetric and kind == "int8":
        assert integers.min(initial=0) >= -127
        assert not grid.zero_point.any()


def test_zeros_stay_zeros() -> None:
    for kind in (INT8, UINT8):
        for symmetric in (True, False):
            grid = weight_grid(np.zeros((4, 3), np.float32), kind, symmetric=symmetric, per_channel=True, name="W")
            assert (grid.scale == 1).all()
            assert (round_to_nearest(np.zeros((4, 3), np.float32), grid) == grid.zero_point).all()


def test_a_range_away_from_zero_is_stretched_to_it() -> None:
    grid = grid_for_range(np.array(2.0), np.array(5.1), UINT8, symmetric=False)
    assert grid.zero_point == 0
    np.testing.assert_allclose(grid.scale, 5.1 / 255, rtol=2.0**-23)


def test_a_large_weight_is_rounded_in_row_blocks_like_a_small_one() -> None:
    weight = np.random.default_rng(0).standard_normal((3000, 2000)).astype(np.float32)  # more than one block of 2^22
    grid = weight_grid(weight, INT8, symmetric=True, per_channel=True, name="W")
    whole = np.rint(weight.astype(np.float64) / grid.scale)
    np.testing.assert_array_equal(round_to_nearest(weight, grid), whole)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_by_name(bad: float) -> None:
    weight = np.ones((2, 2), np.float32)
    weight[1, 0] = bad
    for per_channel in (True, False):
        with pytest.raises(ModelError, match=r"weight 'q_proj' holds NaN or infinity.*exclude"):
            weight_grid(weight, INT8, symmetric=True, per_channel=per_channel, name="q_proj")
