"""Memory that large arrays leave behind, taken again by the next ones while a model is written.

The system fills memory with zeros before it hands it out, which costs as much as a good part of a weight's rotation.
Weights have few sizes and come one after the other, so what one has left serves the next. Outside of ``reused`` arrays
are ordinary ones.
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_LARGE = 1 << 20
"""Bytes from which on it pays."""

_WASTE = 3.0
"""What serves an array is so many times its size at most."""


class _Kept:
    """Memory that is free. Within the lock an array may be collected, which comes back here in the same thread.

    All that is held, lent or free, is never more than was lent at once, at its full size.
    """

    def __init__(self) -> None:
        self._lock, self._users = RLock(), 0
        self._free: list[NDArray[np.uint8]] = []
        self._lent = self._most = 0

    def enter(self) -> None:
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._free, self._most = [], 0

    def take(self, nbytes: int) -> NDArray[np.uint8] | None:
        """The smallest that is large enough and not far too large, the latest of equals, or new memory.

        None where none is to be reused.
        """
        with self._lock:
            if not self._users:
                return None
            fitting = [memory for memory in reversed(self._free) if nbytes <= memory.nbytes <= _WASTE * nbytes]
            taken = min(fitting, key=len) if fitting else None
            if taken is not None:
                self._free = [memory for memory in self._free if memory is not taken]
            self._lent += nbytes if taken is None else taken.nbytes
            self._most = max(self._most, self._lent)
            while sum(memory.nbytes for memory in self._free) > self._most - self._lent:
                self._free.pop(0)
        return np.empty(nbytes, np.uint8) if taken is None else taken

    def give(self, memory: NDArray[np.uint8]) -> None:
        with self._lock:
            self._lent -= memory.nbytes
            if self._users:
                self._free.append(memory)


_kept = _Kept()


@contextmanager
def reused() -> Iterator[None]:
    """What ``large_array`` gives takes the memory of arrays that it gave before and that are gone."""
    _kept.enter()
    try:
        yield
    finally:
        _kept.leave()


def large_array(shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """An array that holds anything, as ``numpy.empty`` gives it."""
    kind = np.dtype(dtype)
    nbytes = math.prod(shape) * kind.itemsize
    memory = _kept.take(nbytes) if nbytes >= _LARGE else None
    if memory is None:
        return np.empty(shape, kind)
    # Views of views refer to the array that holds the memory: here to this one, as it holds a buffer.
    lent = np.frombuffer(memory.data, np.uint8, nbytes)
    weakref.finalize(lent, _kept.give, memory).atexit = False
    return lent.view(kind).reshape(shape)
