"""Large arrays take the memory of those before them, while a model is written, and never more than without that."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from quarot_onnx.io import memory as module
from quarot_onnx.io.memory import large_array, reused
from quarot_onnx.io.tensors import computed_ahead, lazy_tensor

MB = 1 << 20


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> module._Kept:
    monkeypatch.setattr(module, "_kept", module._Kept())
    return module._kept


def place(array: NDArray) -> int:
    return array.__array_interface__["data"][0]


def megabytes(count: float) -> NDArray:
    return large_array([round(count * MB)], np.uint8)


@pytest.mark.parametrize("shape", [(3, 5), (1024, 1024), (0, 7)])
def test_an_array_is_what_was_asked_for(shape: tuple[int, ...]) -> None:
    with reused():
        for dtype in (np.float16, np.float32, np.int8):
            array = large_array(shape, dtype)
            assert (array.shape, array.dtype) == (shape, dtype)
            assert array.flags.c_contiguous
            assert array.flags.writeable
            assert array.flags.aligned


def test_what_one_left_serves_the_next() -> None:
    with reused():
        first = large_array((512, 1024), np.float32)
        where = place(first)
        del first
        assert place(large_array((1024, 1024), np.float16)) == where


@pytest.mark.parametrize("view", [lambda a: a[3:], lambda a: a.T, lambda a: a.view(np.int16)[:, ::2], np.ravel])
def test_a_view_holds_it(view) -> None:
    with reused():
        array = large_array((1024, 1024), np.float32)
        array.fill(1)
        part = view(array)
        before = part.copy()
        del array
        other = large_array((1024, 1024), np.float32)
        other.fill(2)
        np.testing.assert_array_equal(part, before)


def test_a_tensor_holds_it() -> None:
    with reused():
        tensor = ir.Tensor(large_array((1024, 1024), np.float32))
        where = place(tensor.numpy())
        assert place(large_array((1024, 1024), np.float32)) != where
        del tensor
        assert place(large_array((1024, 1024), np.float32)) == where


def test_the_smallest_that_fits_is_taken_and_none_that_is_far_too_large(kept: module._Kept) -> None:
    with reused():
        arrays = {size: megabytes(size) for size in (20, 8, 4, 8.5)}
        places = {size: place(array) for size, array in arrays.items()}
        arrays.clear()
        small, large, other = megabytes(3.5), megabytes(7), megabytes(2.5)
        assert place(small) == places[4]
        assert place(large) == places[8]
        assert len(other) == 2.5 * MB
        assert kept._lent == (4 + 8 + 2.5) * MB


def test_no_more_is_held_than_was_lent_at_once(kept: module._Kept) -> None:
    with reused():
        rng, live, most = np.random.default_rng(0), list[NDArray](), 0
        for _ in range(500):
            if len(live) > 3:
                del live[rng.integers(len(live))]
            live.append(megabytes(rng.choice([1, 2, 3, 5, 8, 13])))
            most = max(most, kept._lent)
            assert kept._lent + sum(memory.nbytes for memory in kept._free) <= most
            assert kept._lent <= 3 * sum(array.nbytes for array in live)


def test_outside_nothing_is_kept(kept: module._Kept) -> None:
    assert megabytes(2).flags.owndata
    with reused():
        outlives = megabytes(2)
        with reused():
            megabytes(3)
        assert kept._free
    assert not kept._free
    outlives.fill(7)
    del outlives
    assert not kept._free
    assert kept._lent == 0


def test_threads_never_share_it() -> None:
    def fill(number: int) -> bool:
        array = megabytes(1 + number % 3)
        array.fill(number % 251)
        return bool((array == number % 251).all())

    with reused(), ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fill, range(200)))


def test_tensors_that_are_written_reuse_it() -> None:
    def compute(number: int) -> NDArray:
        array = large_array((1024, 1024), np.float32)
        array.fill(number)
        return array

    lazy = [
        lazy_tensor(lambda number=number: compute(number), dtype=ir.DataType.FLOAT, shape=(1024, 1024), name="w")
        for number in range(8)
    ]
    places = set()
    for number, tensor in enumerate(computed_ahead(lazy)):
        array = tensor.numpy()
        assert (array == number).all()
        places.add(place(array))
        del array, tensor
    assert len(places) <= 3
