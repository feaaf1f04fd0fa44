"""The statistics of a Linear's inputs: their definition, their precision, and the same bits twice."""

from itertools import pairwise

import numpy as np
import pytest

from quarot_onnx.calibration.hessian import Accumulator, PanelAccumulator, Portions, Products, Statistics, products
from quarot_onnx.calibration.units import units
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


def test_a_unit_ends_where_it_is_said_to() -> None:
    """No partial product reaches across, and one that was computed elsewhere adds up to the same bits."""
    exact, moved = rows(3000, 500, 7), rows(3000, 500, 8)
    ends = (300, 2900, 3000)  # the second one has more rows than a portion
    here, there, unparted = (Accumulator(500, drift=True) for _ in range(3))
    for start, stop in pairwise((0, *ends)):
        here.add(moved[start:stop], exact[start:stop])
        here.end_unit()
        found: list[Products] = []
        portions = Portions(lambda x, missing, found=found: found.append(products(x, missing)), drift=True)
        for part in np.array_split(np.arange(start, stop), 3):
            portions.add(moved[part], exact[part])
        portions.end_unit()
        assert len(found) == (2 if stop == 2900 else 1)
        there.add_products(found, stop - start)
        unparted.add(moved[start:stop], exact[start:stop])
    a, b, c = here.finish(), there.finish(), unparted.finish()
    assert a.tokens == b.tokens == 3000
    assert a.hessian.tobytes() == b.hessian.tobytes()
    assert a.drift is not None
    assert b.drift is not None
    assert a.drift.tobytes() == b.drift.tobytes()
    assert a.hessian.tobytes() != c.hessian.tobytes(), "sums in another order"


def test_panels_summed_apart_are_those_of_the_whole() -> None:
    exact, moved = rows(3000, 1100, 10), rows(3000, 1100, 11)  # three panels
    whole, put_together = (Accumulator(1100, drift=True) for _ in range(2))
    apart = [PanelAccumulator(1100, places, drift=True) for places in ((0, 2), (1,))]
    for start, stop in pairwise((0, 1300, 3000)):
        whole.add(moved[start:stop], exact[start:stop])
        whole.end_unit()
        put_together.add_products((), stop - start)
        for sums in apart:
            portions = Portions(sums.take, drift=True)
            portions.add(moved[start:stop], exact[start:stop])
            portions.end_unit()
    for sums in apart:
        put_together.add_panels(sums.finish())
    a, b = whole.finish(), put_together.finish()
    assert a.tokens == b.tokens
    assert a.hessian.tobytes() == b.hessian.tobytes()
    assert a.drift is not None
    assert b.drift is not None
    assert a.drift.tobytes() == b.drift.tobytes()


def test_products_hold_half_of_h() -> None:
    x = rows(50, 1000, 9)
    alone, both = products(x, None), products(x, x)
    assert alone.drift == ()
    # Panels of 384: half of the matrix, and half a panel beside it.
    assert alone.nbytes <= 4 * 1000 * (1000 + 384) / 2
    assert both.nbytes == alone.nbytes + 4 * 1000 * 1000


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([512] * 9, [range(4), range(4, 8), range(8, 9)]),
        ([700, 700, 700], [range(2), range(2, 3)]),
        ([5000, 100, 2048, 1], [range(1), range(1, 2), range(2, 3), range(3, 4)]),
        ([1], [range(1)]),
    ],
)
def test_units_of_samples(counts: list[int], expected: list[range]) -> None:
    assert units(counts) == expected
