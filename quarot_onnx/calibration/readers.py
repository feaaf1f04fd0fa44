"""Calibration readers: feeds for a model, one sample at a time, in onnxruntime's ``CalibrationDataReader`` protocol.

``get_next()`` returns a feed or None at the end; ``rewind()`` starts over. Any object with ``get_next`` will do
(onnxruntime's own class accepts it the same way), so importing this module imports no onnxruntime; ``wrap`` turns such
an object into a ``RewindableReader``.
"""

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.text import (
    Bos,
    TokenIds,
    check_vocabulary,
    default_text,
    load_tokenizer,
    read_text,
    resolve_bos,
    tokenize,
    tokenizer_file,
    windows,
)
from quarot_onnx.errors import CalibrationError

_REST = 8192  # tokens kept past those that are calibrated on


@runtime_checkable
class DataReader(Protocol):
    """What onnxruntime asks of a reader."""

    def get_next(self) -> Any:
        """The next feed (input name to array), or None at the end."""


class RewindableReader(ABC):
    """A reader that can start over. Iterating it starts over first."""

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


class _IndexedReader(RewindableReader):
    """A reader over samples with numbers."""

    def __init__(self) -> None:
        self._next = 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _sample(self, index: int) -> Feeds: ...

    def get_next(self) -> Feeds | None:
        if self._next >= len(self):
            return None
        self._next += 1
        return self._sample(self._next - 1)

    def rewind(self) -> None:
        self._next = 0


class SampleReader(_IndexedReader):
    """Feeds that are in memory already.

    Args:
        samples: Input name to array, for each sample.
    """

    def __init__(self, samples: Sequence[Feeds]) -> None:
        super().__init__()
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def _sample(self, index: int) -> Feeds:
        return self._samples[index]


class TokenReader(_IndexedReader):
    """Feeds from token ids: each window is one prefill of batch 1.

    Args:
        inputs: The model's inputs.
        token_windows: ``[samples, seq]``.

    Raises:
        CalibrationError: No windows, or an id outside the model's vocabulary.
    """

    def __init__(self, inputs: ModelInputs, token_windows: TokenIds) -> None:
        super().__init__()
        token_windows = np.asarray(token_windows)
        if token_windows.ndim != 2 or token_windows.size == 0:
            raise CalibrationError(
                f"token windows are {list(token_windows.shape)}: need [samples, sequence], not empty"
            )
        check_vocabulary(token_windows, inputs.vocab_size)
        self.inputs = inputs
        self.token_windows = token_windows

    def __len__(self) -> int:
        return len(self.token_windows)

    def _sample(self, index: int) -> Feeds:
        return self.inputs.feed(self.token_windows[index : index + 1])


class TextReader(TokenReader):
    """Feeds from a text.

    Args:
        model_path: The ONNX file.
        text: A UTF-8 text file; None for ``default_text()``.
        tokenizer: A tokenizer.json or the folder that holds one; None for the model's folder.
        samples: Windows.
        seq_len: Tokens of a window, BOS among them.
        bos: The BOS id in front of every window; by default what the tokenizer's files say.

    Attributes:
        text: The file; None for ``default_text()``.
        rest: Token ids of the text past the windows, some thousand at most.

    Raises:
        CalibrationError: The text or the tokenizer cannot be read, do not fit the model, or hold too little.
        ModelError: The model's inputs are not known.
    """

    def __init__(
        self,
        model_path: str | Path,
        text: str | Path | None = None,
        tokenizer: str | Path | None = None,
        *,
        samples: int = 16,
        seq_len: int = 512,
        bos: int | Bos = Bos.AUTO,
    ) -> None:
        self.tokenizer_path = tokenizer_file(Path(model_path).parent if tokenizer is None else tokenizer)
        self.bos_id = resolve_bos(self.tokenizer_path, bos)
        self.text = text
        inputs, tokenizer = ModelInputs.from_path(model_path), load_tokenizer(self.tokenizer_path)
        ids = tokenize(default_text() if text is None else read_text(text), tokenizer)
        cut = windows(
            ids,
            tokenizer,
            length=seq_len,
            count=samples,
            bos_id=self.bos_id,
            vocab_size=inputs.vocab_size,
        )
        used = samples * (seq_len - (self.bos_id is not None))
        self.rest = ids[used : used + _REST]
        super().__init__(inputs, cut)


class NpzReader(_IndexedReader):
    """Feeds from NumPy archives.

    Args:
        path: An .npz file whose arrays are inputs by name, stacked along the first axis: each row is one sample of
            batch 1. Or a folder of .npz files: each is one feed as it is, in the order of their names.
        inputs: The model's inputs; given, samples of token ids alone are completed with mask, positions and cache.

    Raises:
        CalibrationError: No such file, no archive, no arrays, or arrays of different lengths.
    """

    def __init__(self, path: str | Path, inputs: ModelInputs | None = None) -> None:
        super().__init__()
        self._path, self._inputs = Path(path), inputs
        self._files: list[Path] | None = None
        if self._path.is_dir():
            self._files = sorted(self._path.glob("*.npz"))
            self._length = len(self._files)
            if not self._files:
                raise CalibrationError(f"{path} holds no .npz file")
            return
        self._stacked = _load_npz(self._path)
        lengths = {name: len(array) if array.ndim else 0 for name, array in self._stacked.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise CalibrationError(f"the arrays of {path} need one first axis, the samples; they have {lengths}")
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def _sample(self, index: int) -> Feeds:
        if self._files is not None:
            feeds = _load_npz(self._files[index])
        else:
            feeds = {name: array[index : index + 1] for name, array in self._stacked.items()}
        if self._inputs is not None and list(feeds) == [self._inputs.tokens]:
            return self._inputs.feed(feeds[self._inputs.tokens])
        return feeds


class _Wrapped(RewindableReader):
    """Any reader; one without ``rewind`` can be read once."""

    def __init__(self, reader: DataReader) -> None:
        self._reader = reader
        self._started = False

    def get_next(self) -> Feeds | None:
        self._started = True
        feeds = self._reader.get_next()
        if feeds is None:
            return None
        if not isinstance(feeds, Mapping):
            raise CalibrationError(
                f"{type(self._reader).__name__}.get_next() returned {type(feeds).__name__}: need a dict, or None"
            )
        return dict(feeds)

    def rewind(self) -> None:
        if not self._started:
            return
        rewind = getattr(self._reader, "rewind", None)
        if not callable(rewind):
            raise CalibrationError(
                f"{type(self._reader).__name__} has no rewind() and has been read already: make a new reader, "
                "or give it a rewind method"
            )
        rewind()
        self._started = False


def wrap(reader: DataReader) -> RewindableReader:
    """A rewindable reader out of any object with ``get_next``.

    A reader that has no ``rewind`` is read once; starting it over raises CalibrationError.

    Raises:
        CalibrationError: The object has no ``get_next``.
    """
    if isinstance(reader, RewindableReader):
        return reader
    if not callable(getattr(reader, "get_next", None)):
        raise CalibrationError(f"{type(reader).__name__} is no calibration reader: it has no get_next()")
    return _Wrapped(reader)


def _load_npz(path: Path) -> Feeds:
    try:
        if path.is_file() and not zipfile.is_zipfile(path):
            raise CalibrationError(f"{path} is no .npz archive: save the arrays with numpy.savez(path, name=array)")
        with np.load(path, allow_pickle=False) as archive:
            feeds = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise CalibrationError(f"no calibration data at {path}") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path} is no readable .npz archive: {error}") from error
    if not feeds:
        raise CalibrationError(f"{path} holds no arrays")
    return feeds
