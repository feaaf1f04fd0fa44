"""Work on all cores: tasks side by side, each on one of them.

Everything that a task calls, NumPy's BLAS and onnxruntime, stays in the task's thread. Were both to bring threads of
their own, those would wait for each other: BLAS's spin after each product while onnxruntime's work, and the other way
round. What a task computes, and in what order results are added, depends on its arguments alone, so that the bits of a
result do not depend on the number of threads.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from threadpoolctl import threadpool_limits

_ASKED = "OMP_NUM_THREADS"
"""What BLAS and onnxruntime go by, too."""

Item = TypeVar("Item")
Result = TypeVar("Result")

_here = threading.local()


def thread_count() -> int:
    """The cores of the machine, or as many as ``OMP_NUM_THREADS`` says."""
    asked = os.environ.get(_ASKED, "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else os.cpu_count() or 1


def side_by_side(task: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Do a task for every item, as many at a time as there are threads; within a task, one after the other.

    Args:
        task: What to do; it may not depend on the order.
        items: For what.

    Returns:
        The results, in the order of the items; an exception is that of the first item that has one.
    """
    todo = list(items)
    threads = 1 if getattr(_here, "busy", False) else min(thread_count(), len(todo))
    if threads <= 1:
        return [task(item) for item in todo]

    def alone(item: Item) -> Result:
        _here.busy = True
        return task(item)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(alone, todo))


@contextmanager
def blas_in_its_callers_thread() -> Iterator[None]:
    """Let NumPy's and SciPy's BLAS start no threads of their own; what they were allowed comes back at the end."""
    with threadpool_limits(1, user_api="blas"):
        yield
