"""What one model puts out, kept in a file until another one's is compared with it."""

import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import numpy.typing as npt


class Kept:
    """Arrays in a file, read back in the order in which they came; none is added after the first was read."""

    def __init__(self, store: IO[bytes]) -> None:
        """Write to ``store``, which is empty."""
        self._store = store
        self._kinds: deque[tuple[tuple[int, ...], np.dtype[Any]]] = deque()
        self._reading = False

    def put(self, array: npt.NDArray[Any]) -> None:
        """Add an array."""
        assert not self._reading
        self._kinds.append((array.shape, array.dtype))
        self._store.write(np.ascontiguousarray(array).data)

    def take(self) -> npt.NDArray[Any]:
        """The next array, read-only."""
        if not self._reading:
            self._store.seek(0)
            self._reading = True
        shape, dtype = self._kinds.popleft()
        content = self._store.read(int(np.prod(shape)) * dtype.itemsize)
        return np.frombuffer(content, dtype).reshape(shape)


@contextmanager
def kept() -> Iterator[Kept]:
    """An empty file, gone at the end."""
    with tempfile.TemporaryFile(prefix="quarot-outputs-") as store:
        yield Kept(store)
