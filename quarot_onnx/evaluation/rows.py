"""Rows of token ids whose ends are scored by a model: here, or by the workers of a cluster, with the same figures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from quarot_onnx.calibration.text import TokenIds
from quarot_onnx.distributed.cluster import Cluster
from quarot_onnx.errors import ModelError
from quarot_onnx.evaluation.logits import negative_log_likelihood
from quarot_onnx.evaluation.scored import Scored
from quarot_onnx.evaluation.source import Source
from quarot_onnx.piecewise.runs import Model

_SHORTER = "where rows are longer than what the model takes, choose a task with shorter texts"

Found = list[list[tuple[float, bool]]]
"""Of each row of a batch and each of its continuations: the log likelihood in nats, and whether it is the likeliest."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows that are run together.

    Attributes:
        ids: ``[rows, tokens]``, as they are fed.
        lengths: How many tokens of each row count; what is behind them only fills it up.
        continuations: What may end each row: its tokens, the first of which are predicted from the last that count.
    """

    ids: TokenIds
    lengths: tuple[int, ...]
    continuations: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """What is scored.

    Attributes:
        source: The model.
        batches: The rows.
    """

    source: Source
    batches: Sequence[Batch]

    def some(self, places: range) -> "Rows":
        """Some of the batches."""
        return replace(self, batches=self.batches[places.start : places.stop])


def found(rows: Rows, model: Scored, runnable: Model) -> Iterator[Found]:
    """What is found of each batch.

    Args:
        rows: The rows.
        model: What was read of the model.
        runnable: The same, opened.

    Raises:
        FeedError: The model cannot be run on them.
        ModelError: It has no logits of every token, or some that are not finite.
    """
    every = model.logits_of(runnable, (batch.ids for batch in rows.batches), _SHORTER)
    for batch, logits in zip(rows.batches, every, strict=True):
        ends = zip(logits, batch.lengths, batch.continuations, strict=True)
        yield [[_likely(model, of_row[:length], end) for end in given] for of_row, length, given in ends]


def spread_found(rows: Rows, model: Scored, cluster: Cluster) -> Iterator[Found]:
    """The same by the workers of a cluster; each opens the model once.

    Args:
        rows: The rows, of a model that the workers see.
        model: What was read of it.
        cluster: The workers.

    Raises:
        ClusterError: The workers cannot do it.
        QuarotError: As for ``found``.
    """
    groups = rows.source.groups(model, [batch.ids.size for batch in rows.batches], cluster.threads)
    for group in cluster.in_order(find_group, map(rows.some, groups)):
        yield from group


def find_group(rows: Rows) -> list[Found]:
    """What is found of some batches, in a worker."""
    return list(found(rows, *rows.source.kept()))


def _likely(model: Scored, logits: npt.NDArray[np.floating], continuation: tuple[int, ...]) -> tuple[float, bool]:
    """How likely the end of a row is, and whether every token of it is the likeliest one."""
    tokens = np.array(continuation, np.int64)
    logits = logits[-len(tokens) :]
    total = -float(negative_log_likelihood(logits, tokens).sum())
    if not np.isfinite(total):
        raise ModelError(f"the logits of {model.path} are not finite: the model is damaged")
    return total, bool((logits.argmax(axis=-1) == tokens).all())
