"""Hidden states between segments: in memory up to a limit, on disk past it; saved whole for a later run."""

import zipfile
from collections.abc import Container, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, str]
"""Sample and value."""


class States:
    """Arrays by sample and value."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Start empty.

        Args:
            folder: Where arrays go that do not fit; made when the first one does not.
            limit: Bytes to keep in memory.
        """
        self._folder, self._limit = folder, limit
        self._held: dict[Key, NDArray[Any] | Path] = {}
        self._bytes = 0
        self._numbers = count()

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def __getitem__(self, key: Key) -> NDArray[Any]:
        held = self._held[key]
        return np.load(held) if isinstance(held, Path) else held

    def __setitem__(self, key: Key, array: NDArray[Any]) -> None:
        self.discard(key)
        if self._bytes + array.nbytes <= self._limit:
            self._held[key] = array
            self._bytes += array.nbytes
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{next(self._numbers)}.npy"
        np.save(path, array)
        self._held[key] = path

    def discard(self, key: Key) -> None:
        """Forget an array, if it is there."""
        held = self._held.pop(key, None)
        if isinstance(held, Path):
            held.unlink(missing_ok=True)
        elif held is not None:
            self._bytes -= held.nbytes

    def keys(self) -> Iterator[Key]:
        """All keys, in the order in which they came."""
        return iter(tuple(self._held))

    def save(self, path: Path) -> None:
        """Write all arrays into one file, one in memory at a time."""
        write_archive(path, ((key, self[key]) for key in self.keys()))

    def load(self, path: Path) -> None:
        """Read the arrays of a file that ``save`` wrote."""
        for key, array in read_archive(path):
            self[key] = array


def write_archive(path: Path, arrays: Iterable[tuple[Key, NDArray[Any]]]) -> None:
    """Write arrays into one file, one after the other."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, array in arrays:
            add_entry(archive, key, array)


def add_entry(archive: zipfile.ZipFile, key: Key, array: NDArray[Any]) -> None:
    """Write one array into an open archive."""
    sample, name = key
    with archive.open(f"{sample}:{name}", "w", force_zip64=True) as entry:
        np.lib.format.write_array(entry, array, allow_pickle=False)


def read_archive(path: Path, names: Container[str] | None = None) -> Iterator[tuple[Key, NDArray[Any]]]:
    """The arrays of a file, one after the other; those of some values, or of all."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            sample, _, name = entry.partition(":")
            if names is None or name in names:
                yield (int(sample), name), read_entry(archive, (int(sample), name))


def read_entry(archive: zipfile.ZipFile, key: Key) -> NDArray[Any]:
    """One array of an archive.

    Raises:
        KeyError: It is not there.
    """
    sample, name = key
    with archive.open(f"{sample}:{name}") as content:
        return np.asarray(np.lib.format.read_array(content, allow_pickle=False))
