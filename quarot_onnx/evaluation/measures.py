"""Running figures of how far two streams of logits are apart."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from quarot_onnx.evaluation.logits import NEVER, Float64, blocks, to_log_softmax


class Measures:
    """Figures over rows ``[tokens, vocab]`` of two models, a few rows in float64 at a time.

    Of logits those are left out that neither model can come to choose (``NEVER``): a graph that gives -1e9 to tokens
    would be alike whatever it says of the others, as all differences would be small beside that.

    Args:
        distributions: Rows are logits, whose distributions are compared too.

    Attributes:
        rows: Rows seen.
        max_abs: ``max |b - a|``; infinite once ``b`` is not finite.
        largest: ``max |a|``.
    """

    def __init__(self, *, distributions: bool = True) -> None:
        self._distributions = distributions
        self.rows = 0
        self.max_abs = 0.0
        self.largest = 0.0
        self._sum_a = self._sum_diff = self._sum_kl = 0.0
        self._flip_gaps: list[float] = []

    def add(self, a: npt.NDArray[Any], b: npt.NDArray[Any]) -> None:
        """Take in the same rows of both models; those of ``a`` are finite."""
        for part in blocks(len(a)):
            x, y = a[part].astype(np.float64), b[part].astype(np.float64)
            self.rows += len(x)
            readable = np.isfinite(y).all()
            never = _never(x, y if readable else x) if self._distributions else None
            chosen = x if never is None else np.where(never, 0.0, x)
            self.largest = max(self.largest, _magnitude(chosen))
            self._sum_a += float(np.sum(chosen * chosen))
            if not readable:
                self.max_abs = self._sum_diff = self._sum_kl = float("inf")
                self._flip_gaps += [float("inf")] * len(x)
                continue
            if self._distributions:
                self._flip_gaps += _flip_gaps(x, y)
            apart = y - x
            if never is not None:
                apart[never] = 0.0
            self.max_abs = max(self.max_abs, _magnitude(apart))
            apart *= apart
            self._sum_diff += float(np.sum(apart))
            del apart, chosen  # rows of logits are large: few are held at once
            if self._distributions:
                self._sum_kl += float(_kl(x, y).sum())

    @property
    def max_rel(self) -> float:
        """``max |b - a| / max |a|``."""
        return _ratio(self.max_abs, self.largest)

    @property
    def rel_l2(self) -> float:
        """``|b - a| / |a|``."""
        return math.sqrt(_ratio(self._sum_diff, self._sum_a))

    @property
    def kl(self) -> float:
        """Mean ``KL(softmax a || softmax b)`` over rows, in nats; rounding below zero is cut off."""
        return max(self._sum_kl / self.rows, 0.0)

    def top1_agreement(self, near_tie: float) -> float:
        """The share of rows with the same argmax, flips between logits of ``a`` closer than ``near_tie`` included."""
        return 1.0 - sum(gap >= near_tie for gap in self._flip_gaps) / self.rows


def _magnitude(x: Float64) -> float:
    """``max |x|``."""
    return max(float(x.max()), -float(x.min()))


def _never(a: Float64, b: Float64) -> npt.NDArray[np.bool_] | None:
    """What no distribution of either can come to choose; None where there is nothing of the kind."""
    never: npt.NDArray[np.bool_] | None = None
    for x in (a, b):
        bound = x.max(axis=-1, keepdims=True) - NEVER
        if (x.min(axis=-1, keepdims=True) >= bound).all():
            return None
        never = x < bound if never is None else never & (x < bound)
    return never


def _kl(a: Float64, b: Float64) -> Float64:
    """``KL(softmax a || softmax b)`` of every row; neither holds its logits afterwards."""
    log_p, log_q = to_log_softmax(a), to_log_softmax(b)
    apart = np.subtract(log_p, log_q, out=log_q)
    apart *= np.exp(log_p, out=log_p)
    return np.asarray(np.sum(apart, axis=-1))


def _flip_gaps(a: Float64, b: Float64) -> list[float]:
    """For every row whose argmax differs, how far apart the two candidates are in ``a``."""
    first, second = a.argmax(axis=-1), b.argmax(axis=-1)
    flipped = np.flatnonzero(first != second)
    return [float(a[row, first[row]] - a[row, second[row]]) for row in flipped]


def _ratio(part: float, whole: float) -> float:
    if whole == 0.0:
        return 0.0 if part == 0.0 else float("inf")
    return part / whole
