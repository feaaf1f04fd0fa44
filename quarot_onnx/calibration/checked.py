"""Calibration readers: feeds for a model, one sample at a time, in onnxruntime's ``CalibrationDataReader`` protocol.

``get_next()`` returns a feed or None at the end; ``rewind()`` starts over. Any object with ``get_next`` will do
(onnxruntime's own class accepts it the same way), so importing this module imports no onnxruntime; ``wrap`` turns such
an object into a ``CheckedReader``, which says whose reader it was where something is wrong.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sized
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.calibration.bos import BosChoice
from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.filled import with_rows
from quarot_onnx.errors import CalibrationError


@runtime_checkable
class DataReader(Protocol):
    """What onnxruntime asks of a reader."""

    def get_next(self) -> Any:
        """The next feed (input name to array), or None at the end."""


class RewindableReader(ABC):
    """A reader that can start over. Iterating it starts over first.

    Attributes:
        keeps: Whether the arrays of a sample stay as they are when the next one is read.
        counted: How many rows of the sample that was given last count, where others fill up a batch that the graph
            fixes; None where all do.
    """

    keeps = False
    counted: int | None = None

    @property
    def record(self) -> Mapping[str, object]:
        """What it reads, for the report; empty where there is nothing to tell."""
        return {}

    @abstractmethod
    def get_next(self) -> Feeds | None:
        """The next feed (input name to array), or None at the end."""

    @abstractmethod
    def rewind(self) -> None:
        """Start over."""

    def __iter__(self) -> Iterator[Feeds]:
        self.rewind()
        while (feeds := self.get_next()) is not None:
            yield feeds


class CheckedReader(RewindableReader):
    """Any reader, what it gives looked at; one without ``rewind`` can be read once.

    Arrays are copied where the reader may write the next sample into them, as onnxruntime's own calibraters allow.

    Attributes:
        name: The reader's own class, for messages.
        size: How many samples it has, where it tells.
        count: How many it has given, in the longest reading so far.
    """

    keeps = True

    def __init__(self, reader: DataReader) -> None:
        """Read from ``reader``."""
        self._reader = reader
        self.name = type(reader).__name__
        # onnxruntime's own class has a len() that raises.
        self.size = len(reader) if isinstance(reader, RewindableReader) and isinstance(reader, Sized) else None
        self.count = 0
        self._given = 0
        self._ahead: Feeds | None = None

    def require_sample(self) -> None:
        """Refuse a reader that has nothing to give; what is read to find out is given later.

        Raises:
            CalibrationError: It is empty, or what it gives is no sample.
        """
        if self._given or self._ahead is not None:
            return
        self._ahead = self._read()
        rewind = getattr(self._reader, "rewind", None)
        if self._ahead is None and callable(rewind):  # read to its end elsewhere
            rewind()
            self._ahead = self._read()
        if self._ahead is None:
            raise self.empty()

    def empty(self) -> CalibrationError:
        """The error for a reader without samples."""
        return CalibrationError(
            f"the calibration reader {self.name} is empty: it gave no sample; a reader that was read before needs a "
            "rewind method, or make a new one"
        )

    @property
    def decode_steps(self) -> int | None:
        """Decode steps that follow every sample where ranges are taken; 0 for a reader that says nothing of them."""
        return getattr(self._reader, "decode_steps", 0) if isinstance(self._reader, RewindableReader) else 0

    @property
    def bos(self) -> BosChoice | None:
        """What stood in front of every window of text; None where no text was read."""
        bos = getattr(self._reader, "bos", None)
        return bos if self.count and isinstance(bos, BosChoice) else None

    @property
    def record(self) -> Mapping[str, object]:
        """That of a reader of ours which was read, by the key ``calibration``."""
        told = self._reader.record if self.count and isinstance(self._reader, RewindableReader) else {}
        return {"calibration": told} if told else {}

    def notes(self, wanted: int | None) -> tuple[str, ...]:
        """What the user should know of what was read.

        Args:
            wanted: The number of samples asked for (``CalibDataSize``), None for all.
        """
        if not self.count:
            return ()
        own: tuple[str, ...] = () if self.bos is None else getattr(self._reader, "notes", ())
        if wanted is None or self.count >= wanted:
            return own
        few = f"{self.name} gave {self.count} samples, fewer than CalibDataSize {wanted}: calibrated on these"
        return (*own, few)

    def get_next(self) -> Feeds | None:
        """The next feed, or None at the end.

        Raises:
            CalibrationError: Something else came.
        """
        feeds = self._read() if self._ahead is None else self._ahead
        self._ahead = None
        if feeds is not None:
            self._given += 1
            self.count = max(self.count, self._given)
        return feeds

    def rewind(self) -> None:
        """Start over.

        Raises:
            CalibrationError: The reader has been read and cannot.
        """
        # One of ours may have been read elsewhere.
        if not self._given and not isinstance(self._reader, RewindableReader):
            return
        rewind = getattr(self._reader, "rewind", None)
        if not callable(rewind):
            raise CalibrationError(
                f"{self.name} has no rewind() and has been read already: make a new reader, or give it a rewind method"
            )
        rewind()
        self._given, self._ahead = 0, None

    def _read(self) -> Feeds | None:
        try:
            feeds = self._reader.get_next()
        except StopIteration:
            raise CalibrationError(
                f"{self.name}.get_next() raised StopIteration after {self._given} samples: return None at the end, as "
                "next(iterator, None) does"
            ) from None
        if feeds is None:
            return None
        if not isinstance(feeds, Mapping):
            raise CalibrationError(f"{self.name}.get_next() returned {type(feeds).__name__}: need a dict, or None")
        rows = self._reader.counted if isinstance(self._reader, RewindableReader) else None
        return with_rows({name: self._array(name, value) for name, value in feeds.items()}, rows)

    def _array(self, name: str, value: object) -> NDArray[Any]:
        """An input's value, which must be an array."""
        if isinstance(value, np.generic):
            return np.asarray(value)
        if not isinstance(value, np.ndarray) or value.dtype == object:
            what = "an array of objects" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
            raise CalibrationError(
                f"{self.name} gives {what} for {name!r} in sample {self._given}: need a NumPy array of numbers, such "
                "as numpy.array(ids, numpy.int64)"
            )
        return value if isinstance(self._reader, RewindableReader) and self._reader.keeps else value.copy()


def wrap(reader: DataReader) -> CheckedReader:
    """A rewindable reader out of any object with ``get_next``, what it gives checked.

    A reader that has no ``rewind`` is read once; starting it over raises CalibrationError.

    Raises:
        CalibrationError: The object has no ``get_next``, or is the class of such objects.
    """
    if isinstance(reader, CheckedReader):
        return reader
    if isinstance(reader, type):
        raise CalibrationError(
            f"the class {reader.__name__} is no calibration reader, an object of it may be: pass {reader.__name__}(...)"
        )
    if not callable(getattr(reader, "get_next", None)):
        raise CalibrationError(f"{type(reader).__name__} is no calibration reader: it has no get_next()")
    return CheckedReader(reader)
