"""Sums over the positions that two models are compared on: KL divergence, likelihood, the most likely token."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quarot_onnx.evaluation.logits import blocks


class Sums:
    """Sums over positions; in float32, a few rows at a time, and added up in float64."""

    def __init__(self, ids: npt.NDArray[np.int64], steps: int) -> None:
        self._ids, self._prefill = ids, ids.shape[1] - steps
        self.kl = self.decode_kl = self.nll_a = self.nll_b = 0.0
        self.agreed = 0

    def add(self, number: int, a: npt.NDArray[Any], b: npt.NDArray[Any]) -> None:
        """Take in the logits ``[tokens, vocab]`` of a window from both models."""
        for part in blocks(len(a)):
            first, second = _Rows.of(a[part]), _Rows.of(b[part])
            divergence = first.divergence(second)
            decoded = np.arange(part.start, part.stop) >= self._prefill
            self.kl += float(divergence[~decoded].sum())
            self.decode_kl += float(divergence[decoded].sum())
            self.agreed += int((first.shifted.argmax(axis=-1) == second.shifted.argmax(axis=-1)).sum())
            targets = self._ids[number, part.start + 1 : part.stop + 1]
            self.nll_a += first.nll(targets)
            self.nll_b += second.nll(targets)

    def nll(self, number: int, rows: npt.NDArray[Any]) -> float:
        """The negative log likelihood of a window's tokens after the first."""
        parts = blocks(len(rows))
        return sum(_Rows.of(rows[part]).nll(self._ids[number, part.start + 1 : part.stop + 1]) for part in parts)

    def perplexity(self, nll: float) -> float | None:
        """The perplexity that a sum of negative log likelihoods means; None where it is past float64."""
        with np.errstate(over="ignore"):
            value = float(np.exp(nll / (self._ids.size - len(self._ids))))
        return value if np.isfinite(value) else None


@dataclass(frozen=True, eq=False)
class _Rows:
    """Logits of a few positions.

    Attributes:
        shifted: ``[tokens, vocab]``, the largest of each row at 0.
        weights: ``exp`` of them.
        total: The sum of ``weights`` in each row.
    """

    shifted: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]
    total: npt.NDArray[np.float64]

    @classmethod
    def of(cls, logits: npt.NDArray[Any]) -> "_Rows":
        shifted = logits.astype(np.float32)
        shifted -= shifted.max(axis=-1, keepdims=True)
        weights = np.exp(shifted)
        return cls(shifted, weights, weights.sum(axis=-1, dtype=np.float64))

    def divergence(self, other: "_Rows") -> npt.NDArray[np.float64]:
        """KL(self || other) of each row: with x - log sum exp x for log p, only one product of matrices is left."""
        apart = np.einsum("tv,tv->t", self.weights, self.shifted - other.shifted) / self.total
        return np.asarray(apart + np.log(other.total) - np.log(self.total), np.float64)

    def nll(self, targets: npt.NDArray[np.int64]) -> float:
        """The negative log likelihood of each row's next token; of the last row of a window none is known."""
        rows = np.arange(len(targets))
        return float((np.log(self.total[rows]) - self.shifted[rows, targets]).sum())
