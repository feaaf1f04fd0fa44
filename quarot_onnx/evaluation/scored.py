"""Which output of a model holds the logits of every token, and whether any does.

Exports for generation may give the logits of the last token alone, and models without a head give hidden states, which
look the same but for their width: that of the embedding, where logits have one column for each of its rows.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.inputs import embedding_shape, no_logits
from quarot_onnx.calibration.leading import Lead
from quarot_onnx.calibration.pieces import pieces, require_ids
from quarot_onnx.calibration.text import TokenIds
from quarot_onnx.errors import FeedError, ModelError
from quarot_onnx.evaluation.before import Before
from quarot_onnx.evaluation.outputs import windows_outputs
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.runs import Model


@dataclass(frozen=True, eq=False)
class Scored:
    """A model whose logits are read.

    Attributes:
        path: Its file, for messages.
        model: What was read of it; its weights lie in the file.
        inputs: What it is fed, and which output is read.
        table: Rows and columns of its embedding; None where they are not known.
        lead: The prefix that it has before what it is fed.
    """

    path: Path
    model: ir.Model
    inputs: ModelInputs
    table: tuple[int, int] | None
    lead: Lead | None = None

    @classmethod
    def read(cls, path: str | Path) -> "Scored":
        """Find the logits of a model.

        Raises:
            ModelError: It has none, or its inputs are not known.
        """
        path = Path(path)
        model = model_io.load(path)
        inputs = ModelInputs.from_model(model, folder=path.parent)
        found = cls(path, model, inputs, embedding_shape(model.graph, inputs.tokens), Lead.of(model, path.parent))
        if inputs.no_logits:
            raise found._no_logits(inputs.no_logits)
        return found

    @classmethod
    def of_text(cls, path: str | Path) -> "Scored":
        """Find the logits of a model that a text alone can feed.

        Raises:
            FeedError: It takes something else.
            ModelError: It has no logits.
        """
        try:
            model = cls.read(path)
            require_ids(model.inputs)
        except FeedError as error:
            way_out = "what is scored is a model that takes token ids: evaluate one that does"
            raise FeedError(error.reason, way_out) from error
        return model

    def brought(self, ids: Sequence[int] | NDArray[np.int64]) -> int:
        """How many tokens at the start of a text the model brings itself, so that they are not fed."""
        return 0 if self.lead is None else self.lead.shared(np.asarray(ids, np.int64))

    def logits_of(
        self, model: Model, batches: Iterable[TokenIds], way_out: str, decode_steps: int = 0
    ) -> Iterator[list[NDArray[Any]]]:
        """Run batches of rows behind the model's prefix.

        Args:
            model: The model, opened.
            batches: ``[rows, tokens]`` each, no more rows than the graph takes at once.
            way_out: What to do where it cannot be run on them.
            decode_steps: Tokens at the end of every row that are fed one by one.

        Yields:
            Of each batch, in their order, ``[tokens, vocab]`` for each of its rows.

        Raises:
            FeedError: It cannot be run on them.
            ModelError: There are no logits of every token.
        """
        inputs, lengths, rows = self.inputs, deque[int](), deque[int]()

        def noted() -> Iterator[TokenIds]:
            for batch in batches:
                rows.append(len(batch))
                lengths.extend(stop - start for start, stop in pieces(inputs, batch.shape[1], decode_steps))
                yield batch

        parts: list[list[NDArray[Any]]] = []
        outputs = windows_outputs(model, inputs, noted(), [inputs.logits], decode_steps, before=Before(past=self.lead))
        try:
            for place, (output,) in outputs:
                length = lengths.popleft()
                if place.first:
                    parts = [[] for _ in range(rows.popleft())]
                for row, found in enumerate(parts):
                    # Of a fixed batch the first rows; the others repeat them.
                    found.append(self.logits(output[row : row + 1] if output.ndim == 3 else output, length))
                if place.last:
                    yield [found[0] if len(found) == 1 else np.concatenate(found) for found in parts]
        except FeedError as error:
            raise FeedError(error.reason, way_out) from error

    def logits(self, output: NDArray[Any], length: int) -> NDArray[Any]:
        """The logits of one window.

        Args:
            output: What the model gave for it.
            length: Its tokens.

        Returns:
            ``[tokens, vocab]``.

        Raises:
            ModelError: They are not those of every token, or hidden states.
        """
        shape = output.shape
        if output.ndim > 1:
            self._require_logits(shape[-1])
        if shape[:-1] not in {(1, length), (length,)}:
            given = shape[1] if output.ndim == 3 else 1
            raise ModelError(
                f"{self.path} gives logits for {given} of {length} tokens (output {self.inputs.logits!r} "
                f"{list(shape)}), and perplexity needs those of all: export the model without pruning its logits"
            )
        return output.reshape(length, shape[-1])

    def last(self, output: NDArray[Any], rows: int = 1) -> NDArray[Any]:
        """The logits of the last token of each row.

        Args:
            output: What the model gave: of every token, or of the last one alone.
            rows: The rows that were fed; where the graph fixes more, those that filled it up are left out.

        Returns:
            ``[rows, vocab]``.

        Raises:
            ModelError: They are hidden states.
        """
        self._require_logits(output.shape[-1])
        ran = len(output) if output.ndim > 2 else max(rows, self.inputs.lengths.batch or 1)
        found: NDArray[Any] = output.reshape(ran, -1, output.shape[-1])[:rows, -1]
        return found

    def _require_logits(self, width: int) -> None:
        """Refuse an output whose width, which the graph left open, can only be that of something else."""
        why = no_logits(self.inputs.logits, width, self.table)
        if why:
            raise self._no_logits(why)

    def _no_logits(self, why: str) -> ModelError:
        return ModelError(f"{self.path} has no logits: {why}; export it with its language model head")
