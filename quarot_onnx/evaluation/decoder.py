"""A decoder with its cache: tokens go in, the logits of the last one come out, of one text or several.

Every present output goes back as the past input that it carries on. A graph without a cache is run on the whole text
each time, and one that takes a token at a time token by token. A model that does not fit into memory is read from its
file, piece by piece, at every run.
"""

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.pieces import pieces, require_ids
from quarot_onnx.calibration.text import TokenIds
from quarot_onnx.errors import FeedError, ModelError
from quarot_onnx.evaluation.scored import Scored
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.piecewise.runs import ByPieces, opened
from quarot_onnx.piecewise.sweep import Run


class Decoder:
    """A model that goes on with a text.

    Attributes:
        model: Its inputs, its logits, and the prefix that it brings.
        by_pieces: Whether every run reads it from its file.
        notes: What to say of a limit of memory that cannot be kept.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        exact: bool = False,
        memory: Memory = Memory(),  # noqa: B008 - frozen
    ) -> None:
        """Open a model.

        Args:
            path: The ONNX file.
            threads: onnxruntime's intra-op threads.
            exact: Compute 8-bit products exactly where this processor's fast way saturates.
            memory: What it may take, and whether the model is run piece by piece for that.

        Raises:
            ModelError: It cannot be read or run, or is none that text can be generated with.
        """
        self.model = _decodable(Path(path))
        model = self.model.model
        self._runs = opened(path, memory, model=model, threads=threads, exact_products=exact, timed=True)
        self.by_pieces = isinstance(self._runs, ByPieces)
        self.notes = memory.notes(model) if self.by_pieces else ()
        self.start()

    def another(self) -> "Decoder":
        """The same model, open once, for another text beside this one."""
        other = copy(self)
        other.start()
        return other

    def start(self) -> None:
        """Forget the texts, but for the prefix that the caller has to bring."""
        lead = self.model.lead
        self._past: Feeds | None = None if lead is None else lead.past
        self._held = 0 if lead is None else lead.fed_length
        self._ids: TokenIds | None = None

    def feed(self, ids: Sequence[int]) -> npt.NDArray[np.floating]:
        """Go on with the text.

        Args:
            ids: The tokens that come next, one or more.

        Returns:
            The logits of the last one, ``[vocab]``.

        Raises:
            ModelError: onnxruntime fails, or the logits are not numbers.
        """
        logits: npt.NDArray[np.floating] = self.feed_rows(np.array([ids], np.int64))[0]
        return logits

    def feed_rows(self, ids: TokenIds) -> npt.NDArray[np.floating]:
        """Go on with several texts of one length, a row each: as many as at the start, and one behind a prefix.

        Args:
            ids: The tokens that come next, ``[rows, tokens]``.

        Returns:
            The logits of the last ones, ``[rows, vocab]``.

        Raises:
            ModelError: onnxruntime fails, or the logits are not numbers.
        """
        inputs = self.model.inputs
        if not inputs.has_cache:
            self._ids = ids if self._ids is None else np.concatenate([self._ids, ids], axis=1)
            output = self._run(self._ids)[inputs.logits]
        else:
            for start, stop in pieces(inputs, ids.shape[1]):
                outputs = self._run(ids[:, start:stop])
                self._past = inputs.present_to_past(outputs)
                self._held += stop - start
            output = outputs[inputs.logits]
        logits = self.model.last(output, len(ids))
        if not logits.max() < np.inf:  # NaN, too
            raise ModelError(f"the logits of {self.model.path} are not finite: the model is damaged")
        return logits

    def _run(self, ids: TokenIds) -> dict[str, npt.NDArray[Any]]:
        """Logits and presents of one run."""
        inputs = self.model.inputs
        names = [inputs.logits, *(present for _, present in inputs.presents if inputs.has_cache)]
        try:
            (outputs,) = self._runs.outputs([Run(inputs.feed(ids, self._past, self._held))], names)
        except FeedError as error:
            raise FeedError(error.reason, "the model cannot go on with this text") from error
        return dict(zip(names, outputs, strict=True))


def _decodable(path: Path) -> Scored:
    """A model that goes on with a text.

    Raises:
        FeedError: It takes something else than token ids, or other inputs than those of a decoder.
        ModelError: It has no logits, fixes lengths that leave no room for a next token, or a cache that is lost here.
    """
    try:
        model = Scored.read(path)
        require_ids(model.inputs)
        model.inputs.refuse_dropped()
    except FeedError as error:
        way_out = "text is generated with a decoder that takes token ids: name one that does"
        raise FeedError(f"{path}: {error.reason}", way_out) from error
    fixed, inputs = model.inputs.lengths.seq, model.inputs
    if fixed is not None and (fixed > 1 or not inputs.has_cache):
        lacks = "" if inputs.has_cache else ", and no cache holds what was before them"
        raise ModelError(
            f"{path} takes {fixed} token{'s' if fixed > 1 else ''} at a time, no fewer and no more (the shape of "
            f"{inputs.main.name!r} or of its mask or positions){lacks}, so that no next one can be added: generate "
            "with the model whose lengths are free"
        )
    return model
