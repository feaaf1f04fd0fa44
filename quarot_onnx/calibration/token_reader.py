"""Calibration readers over samples with numbers, and the one that makes them of windows of token ids."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from quarot_onnx.calibration.checked import RewindableReader
from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.filled import counted_rows
from quarot_onnx.calibration.pieces import pieces, require_ids
from quarot_onnx.calibration.sample import not_run
from quarot_onnx.calibration.text import TokenIds, check_vocabulary
from quarot_onnx.errors import CalibrationError
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.piecewise.runs import opened
from quarot_onnx.piecewise.sweep import Arrays, Run
from quarot_onnx.progress import Progress


class IndexedReader(RewindableReader):
    """A reader over samples with numbers."""

    keeps = True

    def __init__(self) -> None:
        self._next = 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _sample(self, index: int) -> Feeds: ...

    def get_next(self) -> Feeds | None:
        """The next sample, None behind the last."""
        if self._next >= len(self):
            return None
        self._next += 1
        return self._sample(self._next - 1)

    def rewind(self) -> None:
        """Begin anew."""
        self._next = 0


class TokenReader(IndexedReader):
    """Feeds from token ids: each window is one prefill of batch 1.

    Where the graph fixes the batch, as many windows are one prefill, and those that fill up the last one count for
    nothing. Where it fixes a shorter length, the window is run in pieces, each on the cache of those before it; each
    piece is a sample.

    Args:
        inputs: The model's inputs.
        token_windows: ``[samples, seq]``.
        model_path: The ONNX file, needed for windows in pieces.
        decode_steps: Tokens of each window that are decoded one by one where ranges are taken; None for 4 where the
            graph has a cache.
        memory: How the model is run for windows in pieces.
        progress: Called where it is run piece by piece for them.

    Raises:
        CalibrationError: No windows, an id outside the model's vocabulary, a length that the graph does not take, or
            fewer steps than none.
        FeedError: The graph takes no token ids.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        token_windows: TokenIds,
        model_path: str | Path | None = None,
        *,
        decode_steps: int | None = None,
        memory: Memory | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        require_ids(inputs)
        if decode_steps is not None and decode_steps < 0:
            raise CalibrationError(f"decode_steps {decode_steps}: ask for 0 or more")
        self.decode_steps = decode_steps
        token_windows = np.asarray(token_windows)
        if token_windows.ndim != 2 or token_windows.size == 0:
            raise CalibrationError(
                f"token windows are {list(token_windows.shape)}: need [samples, sequence], not empty"
            )
        check_vocabulary(token_windows, inputs.vocab_size)
        self.inputs = inputs
        self.token_windows = token_windows
        self._pieces = pieces(inputs, token_windows.shape[1])
        self._rows = inputs.lengths.batch or 1
        self._model_path, self._memory, self._progress = model_path, memory or Memory(), progress
        self._pasts: Iterator[Feeds] = iter(())
        if len(self._pieces) > 1 and model_path is None:
            raise CalibrationError(
                f"{inputs.tokens!r} takes {inputs.lengths.seq} of {token_windows.shape[1]} tokens at a time: give "
                "model_path too, so that the model can be run for its cache"
            )

    def __len__(self) -> int:
        return -(-len(self.token_windows) // self._rows) * len(self._pieces)

    def _sample(self, index: int) -> Feeds:
        piece = index % len(self._pieces)
        if index == 0:
            self._pasts = self._caches()
        past = next(self._pasts) if piece else None
        if index == len(self) - 1:
            self._pasts = iter(())  # the model is closed
        self.counted = counted_rows(len(self._windows(index)), self.inputs.lengths.batch)
        return self._fed(index, past)

    def _windows(self, index: int) -> TokenIds:
        """Those that a sample is a piece of."""
        batch = index // len(self._pieces)
        return self.token_windows[batch * self._rows : (batch + 1) * self._rows]

    def _fed(self, index: int, past: Feeds | None) -> Feeds:
        start, stop = self._pieces[index % len(self._pieces)]
        return self.inputs.feed(self._windows(index)[:, start:stop], past, start)

    def _caches(self) -> Iterator[Feeds]:
        """The cache before each sample that is not the beginning of a window."""
        if len(self._pieces) == 1:
            return
        assert self._model_path is not None, "asked before"
        presents = [present for _, present in self.inputs.presents]
        runs = [self._run(index, presents) for index in range(len(self)) if (index + 1) % len(self._pieces)]

        def failed(run: int, _feeds: Arrays, error: Exception) -> CalibrationError:
            return not_run(run + run // (len(self._pieces) - 1), error)  # a window's last piece is not run

        model = opened(self._model_path, self._memory, low_memory=True, progress=self._progress)
        for arrays in model.outputs(runs, presents, failed):
            yield self.inputs.present_to_past(dict(zip(presents, arrays, strict=True)))

    def _run(self, index: int, presents: Sequence[str]) -> Run:
        feeds = self._fed(index, None)
        carried = self.inputs.carried(feeds) if index % len(self._pieces) else {}
        return Run({name: feeds[name] for name in feeds if name not in carried}, carried, keeps=tuple(presents))
