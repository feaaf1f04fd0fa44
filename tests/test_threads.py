"""Work side by side: in order, one level deep, as many threads as asked; and BLAS that starts none of its own."""

import threading
import time

import numpy as np
import pytest
import scipy.linalg
from threadpoolctl import threadpool_info, threadpool_limits

from quarot_onnx.threads import blas_in_its_callers_thread, side_by_side, thread_count


@pytest.mark.parametrize(("asked", "threads"), [("3", 3), ("", 7), ("0", 7), ("many", 7)])
def test_how_many_threads(asked: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert thread_count() == threads


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_results_come_in_the_order_of_the_items(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)

    def late(item: int) -> int:
        time.sleep(0.002 * (3 - item))
        return item * item

    assert side_by_side(late, range(4)) == [0, 1, 4, 9]
    assert side_by_side(late, []) == []


def test_tasks_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    both = threading.Barrier(2, timeout=10)  # passed by two threads together only
    assert sorted(side_by_side(lambda _: both.wait(), range(2))) == [0, 1]


def test_a_task_starts_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")

    def inner(_: int) -> set[int]:
        return set(side_by_side(lambda _: threading.get_ident(), range(3)))

    assert all(len(found) == 1 for found in side_by_side(inner, range(4)))
    outside = side_by_side(lambda _: threading.get_ident(), range(2))
    assert threading.get_ident() not in outside


def test_the_first_items_exception_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")

    def fail(item: int) -> None:
        time.sleep(0.01 * (2 - item))
        raise ValueError(str(item))

    with pytest.raises(ValueError, match="0"):
        side_by_side(fail, range(3))


def test_blas_is_held_to_one_thread_and_let_go() -> None:
    scipy.linalg.cholesky(np.eye(2))  # both libraries are there

    def allowed() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    with threadpool_limits(3, user_api="blas"):
        with blas_in_its_callers_thread():
            assert allowed() == {1}
        assert allowed() == {3}
