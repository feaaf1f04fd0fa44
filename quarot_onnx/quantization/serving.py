"""The range of an activation that serves the Linears behind it best.

An activation is rounded on the grid of every candidate; what counts is the squared error of (Q(x) - x) W over the
Linears that read it. Rows are a sample of all tokens, and, weighing no more than themselves, those with the largest
peaks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.calibration.histogram import LogHistogram
from quarot_onnx.calibration.ranges import Range, RangeRule
from quarot_onnx.config.enums import CalibMethod
from quarot_onnx.quantization.activations import on_fixed_grid, round_trip
from quarot_onnx.quantization.grids import IntegerType

CANDIDATES = (
    RangeRule(),
    RangeRule(CalibMethod.Percentile, 99.999),
    RangeRule(CalibMethod.Percentile, 99.99),
    RangeRule(CalibMethod.MinMSE),
    RangeRule(CalibMethod.Entropy),
)

_SAMPLED, _LARGEST = 64, 8

Rows = NDArray[np.float32]


@dataclass(eq=False)
class SampledRows:
    """Takes in an activation: its histogram, and a few of its rows.

    Attributes:
        histogram: Of all values.
        sampled: Rows drawn at random, each of all tokens with the same chance.
        largest: Those with the largest peaks.
        count: All rows.
    """

    histogram: LogHistogram = field(default_factory=LogHistogram)
    sampled: Rows | None = None
    largest: Rows | None = None
    count: int = 0
    _keys: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def add(self, values: Rows) -> bool:
        """Take in rows [..., features]; False where a value is not finite."""
        if not self.histogram.add(values):
            return False
        rows = values.reshape(-1, values.shape[-1])
        self.count += len(rows)
        keys = np.concatenate([self._keys, self._rng.random(len(rows))])
        chosen = np.argsort(keys, kind="stable")[:_SAMPLED]
        self.sampled, self._keys = _rows(self.sampled, rows, chosen), keys[chosen]
        both = np.concatenate([[] if self.largest is None else np.abs(self.largest).max(1), np.abs(rows).max(1)])
        self.largest = _rows(self.largest, rows, np.argsort(-both, kind="stable")[:_LARGEST])
        return True

    def best(self, rule: RangeRule, weights: Sequence[Callable[[], NDArray[Any]]], *, signed: bool = False) -> Range:
        """The candidate range with the smallest error of the Linears' outputs.

        Args:
            rule: For the bits and whether the grid is symmetric.
            weights: Give the Linears' weights, [in, out]; none: the error of the activation itself counts.
            signed: Whether the integers are.
        """
        assert self.sampled is not None, "no rows were added"
        assert self.largest is not None
        ranges = list(dict.fromkeys(Range(*_for(rule, item).bounds(self.histogram)) for item in CANDIDATES))
        errors = np.zeros(len(ranges))
        parts = ((self.sampled, self.count / len(self.sampled)), (self.largest, 1.0))
        integers = IntegerType(signed, rule.bits)
        kinds = [on_fixed_grid(found.min, found.max, integers, symmetric=rule.symmetric) for found in ranges]
        differences = [[round_trip(rows, kind) - rows for rows, _ in parts] for kind in kinds]
        itself = np.eye(self.sampled.shape[1], dtype=np.float32)
        for load in weights or [lambda: itself]:
            weight = load()
            for number, pair in enumerate(differences):
                for rows, (_, factor) in zip(pair, parts, strict=True):
                    errors[number] += factor * float(np.square(rows @ weight).sum(dtype=np.float64))
        return ranges[int(errors.argmin())]


def _for(rule: RangeRule, candidate: RangeRule) -> RangeRule:
    return RangeRule(candidate.method, candidate.percentile, rule.bits, rule.symmetric)


def _rows(kept: Rows | None, rows: Rows, chosen: NDArray[np.intp]) -> Rows:
    """Of what was kept, followed by new rows, those that are chosen."""
    return (rows if kept is None else np.concatenate([kept, rows]))[chosen]
