"""The grids of static activations are those of onnxruntime."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from onnx import TensorProto
from onnxruntime.quantization.quant_utils import compute_scale_zp, get_qmin_qmax_for_qType
from ort_grids import SUBTRACTS_EXACTLY

from quarot_onnx.quantization.grids import IntegerType, grid_for_range

INT8, UINT8 = IntegerType(signed=True), IntegerType(signed=False)
KINDS = {
    "int8": (INT8, TensorProto.INT8),
    "uint8": (UINT8, TensorProto.UINT8),
    "int16": (IntegerType(signed=True, bits=16), TensorProto.INT16),
    "uint16": (IntegerType(signed=False, bits=16), TensorProto.UINT16),
}
FINITE = st.floats(-1e6, 1e6, width=32)
ENDS = FINITE if SUBTRACTS_EXACTLY else st.floats(-60000, 60000, width=16)


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


def test_zeros_stay_zeros() -> None:
    for kind in (INT8, UINT8):
        for symmetric in (True, False):
            grid = grid_for_range(np.zeros(3), np.zeros(3), kind, symmetric=symmetric)
            assert (grid.scale == 1).all()
            assert not grid.zero_point.any()


def test_a_range_away_from_zero_is_stretched_to_it() -> None:
    grid = grid_for_range(np.array(2.0), np.array(5.1), UINT8, symmetric=False)
    assert grid.zero_point == 0
    np.testing.assert_allclose(grid.scale, 5.1 / 255, rtol=2.0**-23)
