"""Calibration readers of our own: from token ids, a text, or arrays in memory and in archives."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quarot_onnx.calibration.checked import CheckedReader, DataReader, RewindableReader, wrap
from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.filled import counted_rows
from quarot_onnx.calibration.given import load_npz
from quarot_onnx.calibration.pieces import USUAL_WINDOW, default_window
from quarot_onnx.calibration.positions import Positions, positions_of
from quarot_onnx.calibration.running_text import running_text_note
from quarot_onnx.calibration.sample import SHORTER
from quarot_onnx.calibration.spreading import spread_windows
from quarot_onnx.calibration.text import (
    Bos,
    TokenIds,
    check_vocabulary,
    choose_bos,
    default_text,
    load_tokenizer,
    read_text,
    tokenize,
    tokenizer_file,
    windows,
)
from quarot_onnx.calibration.token_reader import IndexedReader, TokenReader
from quarot_onnx.errors import CalibrationError, ShortTextError
from quarot_onnx.graph.metadata import prefix_of, recorded
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.progress import Progress

__all__ = [
    "CheckedReader",
    "DataReader",
    "NpzReader",
    "RewindableReader",
    "SampleReader",
    "TextReader",
    "TokenReader",
    "default_text",
    "wrap",
]

_REST = 8192  # tokens kept past those that are calibrated on
_FROM_START = (
    "windows follow each other from the start of {} and are not from all over it: {}; ask for fewer or shorter ones, "
    "or give more text"
)


class SampleReader(IndexedReader):
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


class TextReader(TokenReader):
    """Feeds from a text.

    Args:
        model_path: The ONNX file.
        text: A UTF-8 text file, plain or JSON lines; None for ``default_text()``.
        tokenizer: A tokenizer.json or the folder that holds one; None for the model's folder.
        samples: Windows of the text.
        seq_len: Tokens of a window, BOS among them; None for 512, or for what the graph takes and has positions for.
        more: Gives windows of so many tokens, ``[windows, tokens]``, as ``own_windows`` does; they come behind those of
            the text. Called once these are there.
        bos: The BOS id in front of every window, or where it comes from; by default what the tokenizer's files say.
        text_key: The key of the text in JSON lines; see ``read_text``.
        decode_steps: See `TokenReader`.
        spread: Windows from all over the text, where each of as many parts of it, of one length and without blank
            stretches, holds one; otherwise one after the other from its start, and a note says so.
        held: Positions that a prefix may take, which is not in the model yet; where nobody says how long windows are,
            they leave room for it.
        model: The model, where it is loaded; None to read it from the file.
        memory: See `TokenReader`.
        progress: See `TokenReader`.

    Attributes:
        bos: The BOS used, and why.
        bos_id: Its id.
        notes: What the user should know: windows that are too long for the model, shorter than usual, or not from all
            over the text; text that is none.
        text: The file; None for ``default_text()``.
        of_text: Windows of the text; none where others are given alone.
        spread: Whether these are from all over it.
        rest: Token ids of the text that are in no window, some thousand at most.

    Raises:
        CalibrationError: The text or the tokenizer cannot be read, do not fit the model, or hold too little.
        FeedError: An input is not known, or the graph takes no token ids.
    """

    def __init__(
        self,
        model_path: str | Path,
        text: str | Path | None = None,
        tokenizer: str | Path | None = None,
        *,
        samples: int = 16,
        seq_len: int | None = None,
        more: Callable[[int], TokenIds] | None = None,
        bos: int | Bos = Bos.AUTO,
        text_key: str | None = None,
        decode_steps: int | None = None,
        spread: bool = True,
        held: int = 0,
        model: ir.Model | None = None,
        memory: Memory | None = None,
        progress: Progress | None = None,
    ) -> None:
        _require_whole("samples", samples)
        _require_whole("seq_len", 0 if seq_len is None else seq_len)
        named = tokenizer_file(Path(model_path).parent if tokenizer is None else tokenizer)
        self.tokenizer_path = named.absolute()  # the check reads it once more, wherever the caller is then
        self.bos = choose_bos(self.tokenizer_path, bos)
        self.bos_id = self.bos.id
        self.text, self.text_key = text, text_key
        if text is None and text_key is not None:
            raise CalibrationError(f"text_key {text_key!r} goes with JSON lines: name a text, or leave it out")
        content = default_text() if text is None else read_text(text, text_key)
        folder = Path(model_path).parent
        model = model_io.load(model_path) if model is None else model
        inputs = ModelInputs.from_model(model, folder=folder)
        tokenizer = load_tokenizer(self.tokenizer_path)
        positions = positions_of(folder, model.graph)
        if seq_len is None:
            there = prefix_of(recorded(model))
            length, of_length = _usual(inputs, positions and positions.behind(held if there is None else len(there[1])))
        else:
            length, of_length = seq_len, () if positions is None else positions.note(seq_len, SHORTER)
        rows = inputs.lengths.batch or 1
        count = -(-samples // rows) * rows
        taken, from_start = None, ""
        if spread and count > 0:
            try:
                taken = spread_windows(content, tokenizer, length=length, count=count, bos_id=self.bos_id, more=_REST)
            except ShortTextError as error:
                from_start = _FROM_START.format(text or "Python's documentation", error.reason)
        self.spread = taken is not None
        if taken is None:
            ids = tokenize(content, tokenizer, max(count * length, 0) + _REST)
            if count or more is None:
                cut = windows(ids, tokenizer, length=length, count=count, bos_id=self.bos_id)
            else:  # others are given alone
                cut = np.empty((0, length), np.int64)
            taken = cut, ids[cut.size : cut.size + _REST]
        cut, self.rest = taken
        check_vocabulary(cut, inputs.vocab_size, tokenizer)
        looks = () if text is None or not len(cut) else running_text_note(cut, tokenizer, str(text))
        self.notes = (*of_length, *([from_start] if from_start else []), *looks)
        self.of_text = len(cut)
        if more is not None:
            added = more(length)
            if added.shape[1:] != (length,):
                raise CalibrationError(f"more windows are {list(added.shape)}: need [windows, {length}]")
            cut = np.concatenate([cut, added])
        super().__init__(inputs, cut, model_path, decode_steps=decode_steps, memory=memory, progress=progress)

    @property
    def record(self) -> Mapping[str, object]:
        """What was calibrated on, for the report: the text, its windows, those given besides, and their tokens."""
        named = None if self.text is None or not self.of_text else str(self.text)
        more = len(self.token_windows) - self.of_text
        seq_len = self.token_windows.shape[1]
        return {"text": named, "windows": self.of_text, "spread": self.spread, "more": more, "seq_len": seq_len}


class NpzReader(IndexedReader):
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
        self._stacked = load_npz(self._path)
        lengths = {name: len(array) if array.ndim else 0 for name, array in self._stacked.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise CalibrationError(f"the arrays of {path} need one first axis, the samples; they have {lengths}")
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def _sample(self, index: int) -> Feeds:
        if self._files is not None:
            feeds = load_npz(self._files[index])
        else:
            feeds = {name: array[index : index + 1] for name, array in self._stacked.items()}
        if self._inputs is not None and list(feeds) == [self._inputs.tokens]:
            ids = feeds[self._inputs.tokens]
            self.counted = counted_rows(len(ids), self._inputs.lengths.batch)
            return self._inputs.feed(ids)
        self.counted = None
        return feeds


def _usual(inputs: ModelInputs, positions: Positions | None) -> tuple[int, tuple[str, ...]]:
    """Tokens of a window where nobody says how many, and what to say where they are not as many as usual."""
    length = default_window(inputs, None if positions is None else positions.count)
    if length == USUAL_WINDOW:
        return length, ()
    why = f"the graph does not take {USUAL_WINDOW}"
    if positions is not None and positions.count < min(default_window(inputs), USUAL_WINDOW):
        why = positions.said
    return length, (f"calibrated on windows of {length} tokens: {why}",)


def _require_whole(name: str, value: object) -> None:
    """Refuse a number of windows, or of tokens, that is none."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 0:
        raise CalibrationError(f"{name}={value!r}: need a whole number from 0 on")
