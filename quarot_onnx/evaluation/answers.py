"""The log likelihood of given continuations: ``sum_i ln p(continuation_i | context, continuation_<i)``.

What is too long for the model is cut off on the left, as lm-eval does: of ``context + continuation`` the last
``positions + 1`` tokens count, and all but the last of these are fed. Rows of one length are run together and nothing
is padded, so that no row sees what it is run beside; a graph that fixes its length gets tokens behind a row, which it
cannot see either. Equal rows are run once. What a row and the prefix of a model begin with alike is not fed again, but
for the last token of the context, whose logits are needed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from quarot_onnx.calibration.inputs import InputRole
from quarot_onnx.calibration.pieces import longest_window
from quarot_onnx.calibration.positions import positions_of
from quarot_onnx.calibration.text import check_vocabulary
from quarot_onnx.distributed.cluster import Cluster
from quarot_onnx.errors import CalibrationError
from quarot_onnx.evaluation.rows import Batch, Rows, found, spread_found
from quarot_onnx.evaluation.scored import Scored
from quarot_onnx.evaluation.source import Source
from quarot_onnx.graph.saturation import saturating_here
from quarot_onnx.io.nodes import all_nodes
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.piecewise.runs import ByPieces
from quarot_onnx.progress import Progress

_OF_ALL_ROWS = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul"})
"""Operators that find one scale for all rows that they are given."""

_POSITIONS = 2048
"""Of a model that does not say how many it has; lm-eval's number."""

Ids = Sequence[int]
Row = tuple[int, ...]


class Answers:
    """A model that is asked how likely continuations are.

    Attributes:
        path: Its file.
        source: The same, and how it is run.
        positions: The most tokens that are fed of a row.
        cut: How many rows were too long and lost tokens on the left.
        saturating: How many products of the model saturate on this processor unless they are computed exactly.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int = 1,
        threads: int | None = None,
        exact: bool = False,
        memory: Memory = Memory(),  # noqa: B008 - frozen
        cluster: Cluster | None = None,
    ) -> None:
        """Open the model.

        Args:
            path: The ONNX file.
            batch_size: Rows of a run, at most; fewer where the graph fixes its batch. One where a cache is fed that
                onnxruntime's fused attention takes for one row alone, and where activations of all rows share a scale.
            threads: onnxruntime's intra-op threads.
            exact: Compute 8-bit products exactly where this processor's fast way saturates.
            memory: What it may take, and whether the model is run piece by piece for that.
            cluster: Workers that run it; None where it is run here.

        Raises:
            ModelError: The model cannot be run, or takes no token ids.
            CalibrationError: A config beside it is not readable.
            ClusterError: The workers do not see it.
        """
        self.path = Path(path)
        self.cut = 0
        self._model = Scored.of_text(path)
        inputs, lead = self._model.inputs, self._model.lead
        held = 0 if lead is None else len(lead.ids)
        graph = self._model.model.graph
        known = positions_of(self.path.parent, graph)
        self.positions = longest_window(
            inputs, max(_POSITIONS - held, 1) if known is None else known.behind(held).count
        )
        self._fixed = inputs.lengths.seq
        fed = lead is not None and lead.past is not None
        shares = any(node.op_type in _OF_ALL_ROWS for node in all_nodes(graph))
        alone = fed or shares or (self._fixed is not None and InputRole.PAST in inputs.roles.values())
        self._rows = 1 if alone else min(batch_size, inputs.lengths.batch or batch_size)
        self.saturating = 0 if exact else saturating_here(self._model.model)
        self.source, self._cluster = Source(self.path, threads, exact, memory), cluster
        if cluster is None:
            self._runnable = self.source.opened(self._model)
        else:
            self.source = self.source.shared(self._model, cluster)

    def score(self, pairs: Sequence[tuple[Ids, Ids]], progress: Progress | None = None) -> list[tuple[float, bool]]:
        """How likely each continuation is, and whether it is what greedy decoding would give.

        Args:
            pairs: Context and continuation, neither empty.
            progress: Called with the pairs done and their number; of a model run piece by piece with the runs done, of
                every piece, and their number.

        Returns:
            In the order of ``pairs``: the log likelihood in nats, and whether every token is the likeliest one.

        Raises:
            CalibrationError: A context or a continuation without tokens, one longer than the model's positions, or ids
                outside its vocabulary.
            ModelError: The model cannot be run, or its logits are not finite.
        """
        asked: dict[Row, list[int]] = {}
        for number, (context, continuation) in enumerate(pairs):
            asked.setdefault(self._row(context, continuation), []).append(number)
        batches = list(self._batches(list(asked)))
        rows = Rows(self.source, [self._batch(batch, asked, pairs) for batch in batches])
        answers, told = dict[int, tuple[float, bool]](), progress
        if self._cluster is not None:
            every = spread_found(rows, self._model, self._cluster)
        elif isinstance(self._runnable, ByPieces):
            every, told = found(rows, self._model, replace(self._runnable, progress=progress)), None
        else:
            every = found(rows, self._model, self._runnable)
        for batch, of_batch in zip(batches, every, strict=True):
            for row, of_row in zip(batch, of_batch, strict=True):
                answers.update(zip(asked[row], of_row, strict=True))
            if told is not None:
                told(len(answers), len(pairs))
        return [answers[number] for number in range(len(pairs))]

    def notes(self) -> tuple[str, ...]:
        """What to say of the rows that were scored."""
        lead, found = self._model.lead, []
        if lead is not None:
            found.append(
                f"the model brings the prefix {list(lead.ids)}: it stands before every text, and what a text begins "
                "with of it is not fed again"
            )
        if self.cut:
            found.append(f"{self.cut} rows were longer than {self.positions} tokens and lost their beginning")
        if self.saturating:
            found.append(f"{self.saturating} products saturate on this processor; --exact computes them exactly")
        return tuple(found)

    def _row(self, context: Ids, continuation: Ids) -> Row:
        """The tokens that are fed for a pair."""
        if not context or not continuation:
            what = "an answer" if context else "a context"
            raise CalibrationError(f"{what} of a task has no tokens: give it some text")
        if len(continuation) > self.positions:
            raise CalibrationError(
                f"an answer of {len(continuation)} tokens does not fit into the {self.positions} that {self.path} "
                "takes at once: choose a task with shorter ones, or a model with more positions"
            )
        whole = np.array([*context, *continuation], np.int64)
        check_vocabulary(whole, self._model.inputs.vocab_size)
        self.cut += len(whole) > self.positions + 1
        whole = whole[-(self.positions + 1) :]
        held = min(self._model.brought(whole), len(whole) - len(continuation) - 1)
        return tuple(whole[held:-1].tolist())

    def _batches(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Rows that are run together, the longest first: what memory does not hold fails at once."""
        lengths: dict[int, list[Row]] = {}
        for row in rows:
            lengths.setdefault(self._length(row), []).append(row)
        for _, alike in sorted(lengths.items(), reverse=True):
            for start in range(0, len(alike), self._rows):
                yield alike[start : start + self._rows]

    def _length(self, row: Row) -> int:
        """The tokens of a row as it is run."""
        return len(row) if self._fixed is None else -(-len(row) // self._fixed) * self._fixed

    def _batch(
        self, rows: Sequence[Row], asked: Mapping[Row, Sequence[int]], pairs: Sequence[tuple[Ids, Ids]]
    ) -> Batch:
        """Rows that are run together, with what is fed behind them where the graph fixes a length, and their ends."""
        ids = np.zeros((len(rows), self._length(rows[0])), np.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = row
        ends = tuple(tuple(tuple(pairs[number][1]) for number in asked[row]) for row in rows)
        return Batch(ids, tuple(map(len, rows)), ends)
