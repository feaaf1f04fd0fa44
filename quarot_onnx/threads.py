"""How many threads work in NumPy takes: our own, over blocks of a weight, and then one of BLAS in each.

BLAS's own threads do not pay in the small products that this package is made of: they wait for each other, at the cost
of more processor time than the products themselves. So work that is spread here holds BLAS to one thread, whatever
``OMP_NUM_THREADS`` says, and takes the cores itself. What comes out does not depend on the number of threads.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from threading import Lock, local
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray
from threadpoolctl import ThreadpoolController

from quarot_onnx.errors import ConfigError

_ASKED = "OMP_NUM_THREADS"
"""What BLAS goes by, too."""

_PER_CORE, _LEAST = 4, 16
"""More threads than this for each core, and than this in all, are never started."""

_jobs: ContextVar[int | None] = ContextVar("jobs", default=None)

Item = TypeVar("Item")
Result = TypeVar("Result")


def as_many_as_help(threads: int) -> int:
    """So many threads, or as many as can be of use: each costs memory, and thousands end in an error of the system."""
    return min(threads, max(_LEAST, _PER_CORE * (os.cpu_count() or 1)))


def thread_count() -> int:
    """What ``limited_to`` says, or else ``OMP_NUM_THREADS``, or else the cores of the machine."""
    if (jobs := _jobs.get()) is not None:
        return jobs
    asked = os.environ.get(_ASKED, "")
    if asked.isdecimal() and int(asked) > 0:
        return as_many_as_help(int(asked))
    return os.cpu_count() or 1


def asked_for() -> int | None:
    """The threads that ``limited_to`` gives; None outside of it."""
    return _jobs.get()


@contextmanager
def limited_to(jobs: int | None) -> Iterator[None]:
    """Hold all that runs inside to so many threads, as far as they help; None leaves them as they are.

    Raises:
        ConfigError: Fewer than one.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"{jobs} threads do no work; give 1 or more, or none for one per core")
    token = _jobs.set(_jobs.get() if jobs is None else as_many_as_help(jobs))
    try:
        yield
    finally:
        _jobs.reset(token)


def spread(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Do the work on every item, on as many threads as there may be; within it nothing is spread any further.

    Args:
        work: What to do; it may not depend on what became of other items.
        items: On what.

    Returns:
        What came of them, in their order; what is raised is what the first of them raises.
    """
    threads = min(thread_count(), len(items))
    with one_blas_thread():
        if threads <= 1:
            return [work(item) for item in items]

        def alone(item: Item) -> Result:
            with limited_to(1):
                return work(item)

        tasks = [_pool(thread_count()).submit(alone, item) for item in items]
        try:
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            wait(tasks)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay, and with them their scratch arrays; what is spread within one of them is done by itself."""
    return ThreadPoolExecutor(threads, "spread")


if hasattr(os, "register_at_fork"):  # A child has none of its parent's threads; on Windows there are no such children.
    os.register_at_fork(after_in_child=_pool.cache_clear)


class Scratch(local):
    """Arrays of a thread that are used again, part after part: new memory costs more than a pass over it."""

    def __init__(self) -> None:
        """Nothing is held yet."""
        self._held = dict[str, NDArray[Any]]()

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array that holds anything; the one that was asked for by the same name before is gone."""
        size, held = math.prod(shape), self._held.get(name)
        if held is None or held.size < size or held.dtype != dtype:
            held = self._held[name] = np.empty(size, dtype)
        return held[:size].reshape(shape)


def panels(size: int, width: int) -> list[slice]:
    """The rows of a lower triangle in panels to spread, those with the most work first."""
    return [slice(start, min(start + width, size)) for start in reversed(range(0, size, width))]


class _Limit:
    """BLAS's threads are of the whole process, and some hold them to one at a time: the last of them lets go."""

    def __init__(self) -> None:
        self._lock, self._holders, self._modules = Lock(), 0, 0

    def hold(self) -> None:
        with self._lock:
            if self._holders == 0:
                self._limits = self._pools().limit(limits=1, user_api="blas")
            self._holders += 1

    def _pools(self) -> ThreadpoolController:
        """The libraries of the process: looked for again, some 5 ms, once modules have come, which bring them."""
        if self._modules != len(sys.modules):
            self._modules, self._found = len(sys.modules), ThreadpoolController()
        return self._found

    def let_go(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                self._limits.restore_original_limits()


_limit = _Limit()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """BLAS computes in the thread that calls it; may be entered from many threads, and within itself."""
    _limit.hold()
    try:
        yield
    finally:
        _limit.let_go()
