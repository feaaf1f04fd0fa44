"""The statistics of a Linear's inputs: their definition, their precision, and the same bits twice."""

import numpy as np
import pytest

from quarot_onnx.calibration.hessian import Accumulator, Statistics
from quarot_onnx.threads import one_blas_thread

EPS = float(np.finfo(np.float32).eps)


def rows(count: int, features: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, features)).astype(np.float32)


@pytest.mark.parametrize(("count", "features"), [(1, 13), (2047, 13), (2048, 13), (2049, 13), (4500, 13), (700, 1100)])
def test_hessian_and_drift_are_what_they_say(count: int, features: int) -> None:
    exact, moved = rows(count, features, 0), rows(count, features, 1)
    accumulator = Accumulator(features, drift=True)
    for start in range(0, count, 700):
        accumulator.add(moved[start : start + 700], exact[start : start + 700])
    found = accumulator.finish()
    assert found.tokens == count
    assert found.drift is not None
    assert found.hessian.dtype == found.drift.dtype == np.float64
    wide, other = moved.astype(np.float64), exact.astype(np.float64)
    # 2048 products are summed in float32: off by 2048 eps of the sum of their magnitudes at the very most.
    limit = 2048 * EPS * (np.abs(wide).T @ np.abs(wide)).max() / count
    np.testing.assert_allclose(found.hessian, wide.T @ wide / count, atol=limit, rtol=0)
    np.testing.assert_allclose(found.drift, (other - wide).T @ wide / count, atol=4 * limit, rtol=0)
    np.testing.assert_allclose(found.hessian + found.drift.T, wide.T @ other / count, atol=5 * limit, rtol=0)


def test_the_hessian_is_symmetric_and_positive() -> None:
    accumulator = Accumulator(40, drift=False)
    accumulator.add(rows(25, 40, 2))
    found = accumulator.finish()
    assert found.drift is None
    scale = np.abs(found.hessian).max()
    np.testing.assert_array_equal(found.hessian, found.hessian.T)
    assert np.linalg.eigvalsh(found.hessian).min() > -2048 * EPS * scale


def test_a_small_drift_beside_a_massive_input_keeps_its_digits() -> None:
    moved = rows(400, 6, 3)
    moved[:, 0] = 3e4  # an attention sink
    exact = moved + np.float32(0.0)
    exact[:, 3] += np.float32(2.0**-10) * rows(400, 6, 4)[:, 3]
    accumulator = Accumulator(6, drift=True)
    accumulator.add(moved, exact)
    found = accumulator.finish()
    assert found.drift is not None
    difference = exact.astype(np.float64) - moved
    expected = difference.T @ moved.astype(np.float64) / 400
    size = np.abs(difference).T @ np.abs(moved.astype(np.float64)) / 400
    assert (np.abs(found.drift - expected) <= 2048 * EPS * size).all()
    assert np.abs(expected[3, 1:]).max() < 1e-3  # where a difference of sums near 1e9 would leave nothing


def summed(exact: np.ndarray, moved: np.ndarray, portion: int) -> Statistics:
    accumulator = Accumulator(exact.shape[1], drift=True)
    for start in range(0, len(exact), portion):
        accumulator.add(moved[start : start + portion], exact[start : start + portion])
    return accumulator.finish()


def test_bits_depend_neither_on_portions_nor_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, moved = rows(4500, 900, 5), rows(4500, 900, 6)  # three partial products, three panels
    found = []
    with one_blas_thread():
        for threads, portion in ((1, 4500), (1, 4500), (2, 600), (5, 2048), (3, 999)):
            monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
            found.append(summed(exact, moved, portion))
    for other in found[1:]:
        assert other.tokens == found[0].tokens
        assert other.hessian.tobytes() == found[0].hessian.tobytes()
        assert other.drift is not None
        assert found[0].drift is not None
        assert other.drift.tobytes() == found[0].drift.tobytes()


def test_no_rows_at_all() -> None:
    found = Accumulator(4, drift=True).finish()
    assert found.tokens == 0
    assert not found.hessian.any()
    assert not found.drift.any()
