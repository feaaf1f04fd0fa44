"""Arithmetic on logits, in float64 and a few rows at a time: a vocabulary of 128k makes a row a megabyte."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

ROWS = 64  # rows of logits worked on at a time

NEVER = 1e3
"""Nats below a row's largest logit; what is lower has no probability, not even in float64.

Graphs write -1e9, the lowest number of a type or minus infinity where a token must not come."""

Float64 = npt.NDArray[np.float64]


def readable(logits: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """Logits with the lowest number of their type for minus infinity; None where no distribution can be read of them.

    Args:
        logits: ``[tokens, vocab]``; left as they are.
    """
    if np.isfinite(logits).all():
        return logits
    never = np.isneginf(logits)
    if never.all(axis=-1).any() or not (np.isfinite(logits) | never).all():
        return None
    return np.where(never, np.finfo(logits.dtype).min, logits)


def log_softmax(logits: npt.NDArray[Any]) -> Float64:
    """``log softmax`` along the last axis, in float64."""
    return to_log_softmax(logits.astype(np.float64))


def to_log_softmax(logits: Float64) -> Float64:
    """The same in place; the maximum is taken off first, so that nothing overflows."""
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits


def negative_log_likelihood(logits: npt.NDArray[Any], targets: npt.NDArray[np.int64]) -> Float64:
    """The negative log likelihood of each target, in nats.

    Args:
        logits: ``[tokens, vocab]``.
        targets: ``[tokens]``.

    Returns:
        ``[tokens]``.
    """
    parts = [
        -np.take_along_axis(log_softmax(logits[rows]), targets[rows, None], axis=1)[:, 0]
        for rows in blocks(len(targets))
    ]
    return np.concatenate(parts)


def blocks(rows: int) -> Iterator[slice]:
    """Slices of at most ``ROWS`` rows."""
    for start in range(0, rows, ROWS):
        yield slice(start, min(start + ROWS, rows))
