"""Work is spread over as many threads as were asked for, and BLAS keeps to one in each meanwhile."""

import os
import subprocess
import sys
import threading
import time
from threading import Barrier

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from quarot_onnx.errors import ConfigError
from quarot_onnx.sessions import runtime
from quarot_onnx.threads import Scratch, asked_for, limited_to, one_blas_thread, spread, thread_count


def blas_threads() -> set[int]:
    np.ones((2, 2)) @ np.ones((2, 2))
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_all_that_are_asked_for_work_at_once() -> None:
    meeting = Barrier(3, timeout=30)  # passed only by three threads that are there together
    with limited_to(3):
        spread(lambda _: meeting.wait(), range(3))


def test_one_thread_is_the_callers() -> None:
    seen: list[int] = []
    with limited_to(1):
        spread(lambda _: seen.append(threading.get_ident()), range(4))
    assert set(seen) == {threading.get_ident()}


def test_a_limit_holds_inside_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with limited_to(2):
        assert (thread_count(), asked_for()) == (2, 2)
        with limited_to(None):
            assert thread_count() == 2
    assert (thread_count(), asked_for()) == (5, None)


def test_no_threads_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 threads"), limited_to(0):
        pass


def test_blas_has_its_threads_again_when_the_last_lets_go() -> None:
    with threadpool_limits(2, "blas"):
        outer = one_blas_thread()
        outer.__enter__()
        inner = one_blas_thread()
        inner.__enter__()
        assert blas_threads() == {1}
        outer.__exit__(None, None, None)  # not in the order of entering: as threads may do
        assert blas_threads() == {1}
        inner.__exit__(None, None, None)
        assert blas_threads() == {2}


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_goes_wrong_is_raised_and_blas_is_let_go(jobs: int) -> None:
    def work(item: int) -> None:
        assert blas_threads() == {1}
        if item == 3:
            raise KeyError(item)

    with threadpool_limits(2, "blas"), limited_to(jobs):
        with pytest.raises(KeyError, match="3"):
            spread(work, range(5))
        assert blas_threads() == {2}


@pytest.mark.parametrize(("asked", "threads"), [("3", 3), ("", 7), ("0", 7), ("many", 7), ("9999999999", 28)])
def test_how_many_threads(asked: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert thread_count() == threads


@pytest.mark.parametrize(("cores", "most"), [(1, 16), (2, 16), (64, 256), (None, 16)])
def test_threads_that_cannot_help_are_not_started(
    cores: int | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    for jobs in (1, most, most + 1, 3_000_000_000):
        with limited_to(jobs):
            assert thread_count() == asked_for() == min(jobs, most)
        assert runtime.session_options(frozenset(), threads=jobs).intra_op_num_threads == min(jobs, most)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    def late(item: int) -> int:
        time.sleep(0.002 * (3 - item))
        return item * item

    with limited_to(threads):
        assert spread(late, range(4)) == [0, 1, 4, 9]
        assert spread(late, []) == []


def test_a_task_starts_no_more_threads() -> None:
    def inner(_: int) -> set[int]:
        return set(spread(lambda _: threading.get_ident(), range(3)))

    with limited_to(2):
        assert all(len(found) == 1 for found in spread(inner, range(4)))
        assert thread_count() == 2


def test_threads_and_their_scratch_arrays_stay() -> None:
    scratch, meeting = Scratch(), Barrier(2, timeout=30)

    def place(_: int) -> tuple[int, int]:
        meeting.wait()
        array = scratch.array("x", (1000,), np.float32)
        return threading.get_ident(), array.__array_interface__["data"][0]

    with limited_to(2):
        first = set(spread(place, range(2)))
        assert len({where for _, where in first}) == 2
        assert set(spread(place, range(2))) == first


def test_nothing_is_left_at_work_when_something_goes_wrong() -> None:
    begun, ended = [], []

    def work(item: int) -> None:
        begun.append(item)
        time.sleep(0.05)
        if item == 0:
            raise KeyError(item)
        ended.append(item)

    with limited_to(2):
        with pytest.raises(KeyError):
            spread(work, range(50))
        assert len(begun) < 10
        assert sorted([0, *ended]) == sorted(begun)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own() -> None:
    program = """
import os, sys
from quarot_onnx.threads import limited_to, spread
with limited_to(2):
    spread(abs, range(4))
    child = os.fork()
    if not child:
        os._exit(sum(spread(abs, range(4))))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "6\n"


def test_the_first_items_exception_is_raised() -> None:
    def fail(item: int) -> None:
        time.sleep(0.01 * (2 - item))
        raise ValueError(str(item))

    with limited_to(3), pytest.raises(ValueError, match="0"):
        spread(fail, range(3))


def test_a_blas_that_comes_later_is_held_too() -> None:
    """SciPy brings one of its own."""
    program = """
import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits
from quarot_onnx.threads import one_blas_thread
def blas(): return sorted(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
threadpool_limits(2, "blas")
with one_blas_thread():
    before = blas()
import scipy.linalg
threadpool_limits(2, "blas")
with one_blas_thread():
    print(before, blas(), end=" ")
print(blas())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[1] [1, 1] [2, 2]\n"
