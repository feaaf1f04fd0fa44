"""Which tokens are the outliers, and the shortest prefix that rids a text of them.

The peak of a token at a Linear's input is max|x| over its channels. A fixed scale has to hold the largest peak of all
tokens, and serves the median one: log2(largest / median) bits of it are lost. A prefix is as good as few bits are lost,
on the mean over the inputs, by the tokens after it.

Attention sinks into the first token, and now and then into one that follows it: of some texts the second token becomes
an outlier although a BOS stands before it. So it is many beginnings that are looked at: the texts are cut into short
pieces, and each is run after the prefix. That grows token by token: first what all texts begin with (a BOS), then one
that is frequent in the text or among the outliers (PrefixQuant, section 4.2, takes the most frequent outliers).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.leading import behind
from quarot_onnx.calibration.observing import (
    ROW_PEAKS,
    Observation,
    observe_samples,
    observing_session,
    run_observing,
)
from quarot_onnx.calibration.padding import Sample
from quarot_onnx.calibration.readers import SampleReader
from quarot_onnx.calibration.text import TokenIds
from quarot_onnx.errors import CalibrationError
from quarot_onnx.graph.linear import linears
from quarot_onnx.graph.routing import routed_values
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.progress import Progress

OUTLIER = 16.0
"""A token is an outlier at an input where its peak is so many times the median."""

_PIECE, _PIECES, _ROWS = 32, 128, 16
_FREQUENT = 2
WORTH = 0.05
"""Bits that a prefix must save to be worth its while, and a longer one beside a shorter."""


@dataclass(frozen=True)
class Loss:
    """What outliers cost after a prefix.

    Attributes:
        ids: The prefix.
        bits: log2(largest / median) on the mean over the inputs.
        worst: The largest ratio, and the input's name.
        pieces: Pieces of text in which some token is an outlier.
        outliers: Tokens that are outliers somewhere, with how often, the most frequent first.
    """

    ids: tuple[int, ...]
    bits: float
    worst: tuple[float, str]
    pieces: int
    outliers: tuple[tuple[int, int], ...]


class Sinks:
    """Looks at one model on one set of texts."""

    def __init__(
        self,
        model: ir.Model,
        inputs: ModelInputs,
        names: Sequence[str],
        texts: Sequence[TokenIds],
        *,
        memory: Memory = WHOLE,
    ) -> None:
        """Cut the texts into pieces; nothing is run yet.

        Args:
            model: The float model, its weights in files.
            inputs: What it is fed.
            names: The Linears' inputs; those without a row for each token, as of experts, which see some alone, or of a
                head that reads the last one, are not looked at. Where there are no others, every other Linear's is.
            texts: ``[rows, tokens]`` each.
            memory: Whether the model is run piece by piece: then its weights are read once for every prefix.

        Raises:
            CalibrationError: There is hardly any text.
        """
        self._inputs, self._peaks = inputs, _RowPeaks(_unrouted(model.graph, names))
        self._model, self._memory, self._rows = model, memory, inputs.lengths.batch or _ROWS
        rows = [row for text in texts for row in text]
        firsts = {int(row[0]) for row in rows}
        self.start = firsts.pop() if len(rows) > 1 and len(firsts) == 1 else None
        self.pieces = _pieces([row[int(self.start is not None) :] for row in rows])
        if not len(self.pieces):
            behind = "" if self.start is None else " behind the one that all begin with"
            raise CalibrationError(
                f"a sink prefix is looked for on texts of {_PIECE} tokens or more{behind}: give longer ones "
                "(--calib-seq-len; seq_len of the reader)"
            )

    def search(self, longest: int, progress: Progress | None = None) -> tuple[Loss, ...]:
        """What was tried and kept, each a token longer than the one before.

        Args:
            longest: Tokens of a prefix at the most.
            progress: Called after every prefix that was tried.

        Returns:
            The first is without a prefix, on the texts as given.
        """
        tell: Callable[[int, int | None], None] = progress or (lambda _done, _total: None)
        tried, kept = 1, [self.loss((), given=True)]
        while len(kept) <= longest and kept[-1].outliers:
            best: Loss | None = None
            for token in self._candidates(kept[-1]):
                found = self.loss((*kept[-1].ids, token))
                best = found if best is None or found.bits < best.bits else best
                tried += 1
                tell(tried, None)
            if best is None or (kept[-1].ids and best.bits > kept[-1].bits - WORTH):
                break
            kept.append(best)
        return tuple(kept)

    def _observed(self, before: tuple[int, ...], last: int) -> dict[str, NDArray[np.float32]]:
        """The peaks of the last tokens of all pieces after a prefix, by input: ``[pieces, last]``."""
        fed = [behind(before, self.pieces[n : n + self._rows]) for n in range(0, len(self.pieces), self._rows)]
        samples = SampleReader([self._inputs.feed(ids) for ids in fed])
        try:
            observe_samples(self._peaks, self._model, samples, memory=self._memory)
        except CalibrationError:
            if self._rows == 1 or self._inputs.lengths.batch:
                raise
            self._rows = 1  # a graph may take one alone, whatever its inputs say
            return self._observed(before, last)
        found = self._peaks.taken([ids.shape for ids in fed], last, self._inputs.lengths.batch)
        if not found:
            raise CalibrationError(
                f"a sink prefix is looked for where there is a row for each token, and {self._peaks.names[0]!r} "
                "has none: name its tokens (--prefix-ids; ids in Python and recipes), or leave it out"
            )
        return found

    def _candidates(self, loss: Loss) -> list[int]:
        """Tokens that may come next."""
        if not loss.ids and self.start is not None:
            return [self.start]
        frequent = [token for token, _ in Counter(self.pieces.reshape(-1).tolist()).most_common(_FREQUENT)]
        return list(dict.fromkeys([*frequent, loss.outliers[0][0]]))

    def loss(self, ids: tuple[int, ...], *, given: bool = False) -> Loss:
        """What outliers cost after a prefix; ``given``: with what all texts begin with, itself counted."""
        before = ids if not given or self.start is None else (self.start,)
        counted = self.pieces if not given else behind(before, self.pieces)
        joined = self._observed(before, counted.shape[1])
        ratios = {name: found / max(float(np.median(found)), 1e-30) for name, found in joined.items()}
        largest = {name: float(ratio.max()) for name, ratio in ratios.items()}
        odd = np.any([ratio > OUTLIER for ratio in ratios.values()], axis=0)
        worst = max(largest, key=largest.__getitem__)
        return Loss(
            ids=ids,
            bits=float(np.mean(np.log2(np.maximum(list(largest.values()), 1.0)))),
            worst=(largest[worst], worst),
            pieces=int(odd.any(axis=1).sum()),
            outliers=tuple(Counter(counted[odd].tolist()).most_common()),
        )


class _RowPeaks:
    """Takes the peak of every token, sample by sample."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._found: dict[str, dict[int, NDArray[np.float32]]] = {}
        self._latest: tuple[ir.Model, Any] | None = None

    def on(
        self,
        model: ir.Model,
        names: Sequence[str],
        kept: Sequence[str] = (),
        *,
        part: bool = False,  # noqa: ARG002 - a sample is run once anyhow
    ) -> Observation:
        """Open a model, or a piece of one; the latest stays open, as the whole one is asked for with every prefix."""
        if self._latest is None or self._latest[0] is not model:
            self._latest = None  # before the new one takes its room
            self._latest = model, observing_session(model, names, (ROW_PEAKS,), None, kept)
        session = self._latest[1]

        def observe(sample: Sample) -> list[Any]:
            seen, handed = run_observing(session, sample, len(names), kept)
            for name, peaks in zip(names, seen, strict=True):
                self._found.setdefault(name, {})[sample.number] = peaks
            return handed

        return observe

    def taken(self, shapes: Sequence[tuple[int, ...]], last: int, batch: int | None) -> dict[str, NDArray[np.float32]]:
        """What was found, which is forgotten: ``[rows, last]`` of each name that has a peak for each token.

        Args:
            shapes: ``[rows, tokens]`` of the samples.
            last: How many tokens of each row count, from its end.
            batch: The rows that were run, where the graph fixes them.
        """
        found, self._found = self._found, {}
        whole = [(batch or rows) * tokens for rows, tokens in shapes]
        return {
            name: np.concatenate(
                [found[name][number].reshape(-1, tokens)[:rows, -last:] for number, (rows, tokens) in enumerate(shapes)]
            )
            for name in self.names
            if [found[name][number].size for number in range(len(shapes))] == whole
        }


def _unrouted(graph: ir.Graph, names: Sequence[str]) -> list[str]:
    """The names that are of no expert's input; where none is left, those of all other Linears of the graph."""
    routed = {value.name for value in routed_values(graph)}
    kept = [name for name in names if name not in routed]
    if not kept:
        every = (linear.input.name or "" for linear in linears(graph))
        kept = [name for name in every if name not in routed]
    return list(dict.fromkeys(kept))


def _pieces(rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Pieces ``[pieces, tokens]`` of texts, from all over them."""
    found = [row[i : i + _PIECE] for row in rows for i in range(0, len(row) - _PIECE + 1, _PIECE)]
    chosen = np.unique(np.linspace(0, max(len(found) - 1, 0), _PIECES).astype(int))
    return np.array([found[i] for i in chosen if found], np.int64).reshape(-1, _PIECE)
