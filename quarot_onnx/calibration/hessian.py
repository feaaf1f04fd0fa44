"""What Hessian-aware rounding needs to know of a Linear's inputs, summed up as they pass.

    H = X̃ᵀX̃ / N,    D = (X - X̃)ᵀX̃ / N,    X, X̃: [N, in]

X̃ are the inputs on the path whose earlier weights (and, where asked for, activations) are quantized, X those of the
float model. H is the Hessian of ||X̃w - X̃q||² up to a factor (GPTQ, Frantar et al. 2022, section 3); D carries the
error of everything before the Linear (GPTAQ, Li et al. 2025; Qronos, Zhang et al. 2025, where G = X̃ᵀX / N = H + Dᵀ).
D is summed of differences: taken as the difference of two sums it would drown in the rounding of their largest entries,
which the attention sink makes many orders of magnitude larger than the rest.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.threads import panels, spread

_ROWS = 2048
"""Rows of one partial product: float32 products of so many rows, summed in float64 in a fixed order.

In the first block of SmolLM2 that puts H_ij off by 1e-8 to 5e-8 of √(H_ii H_jj), where 512 rows put it off by 9e-9 to
4e-8 and cost a tenth more time (root mean square over all i, j, against sums in float64).
"""

_PANEL = 384
"""Features of a panel of H and D, which one thread works on at a time."""

_BLOCK = 128
"""Rows and columns of a block that is mirrored at once: it and its image stay in a core's cache."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Second moments of a Linear's inputs.

    Attributes:
        hessian: H, float64 [in, in], symmetric.
        drift: D, float64 [in, in]; None where the float path was not followed.
        tokens: N, the number of rows that were summed.
    """

    hessian: NDArray[np.float64]
    drift: NDArray[np.float64] | None
    tokens: int


@dataclass(eq=False)
class _Waiting:
    """Rows that are not summed up yet, in the order in which they came."""

    quantized: list[NDArray[np.float32]] = field(default_factory=list)
    float_: list[NDArray[np.float32]] = field(default_factory=list)
    count: int = 0


class Accumulator:
    """Sums up statistics; two runs over the same rows in the same order give the same bits.

    However the rows are portioned, and however many threads work.
    """

    def __init__(self, in_features: int, *, drift: bool) -> None:
        """Start at zero.

        Args:
            in_features: Length of a row.
            drift: Whether D is wanted.
        """
        self._hessian = np.zeros((in_features, in_features))
        self._drift = np.zeros((in_features, in_features)) if drift else None
        self._tokens = 0
        self._waiting = _Waiting()

    def add(self, quantized: NDArray[np.float32], float_: NDArray[np.float32] | None = None) -> None:
        """Add rows, which must not change afterwards.

        Args:
            quantized: X̃, [rows, in].
            float_: X, [rows, in]; needed where D is wanted.
        """
        start = 0
        while start < len(quantized):
            waiting = self._waiting
            stop = min(len(quantized), start + _ROWS - waiting.count)
            waiting.quantized.append(quantized[start:stop])
            if self._drift is not None:
                assert float_ is not None
                waiting.float_.append(float_[start:stop])
            waiting.count += stop - start
            if waiting.count == _ROWS:
                self._sum_up()
            start = stop
        self._tokens += len(quantized)

    def finish(self) -> Statistics:
        """The statistics of all rows. They take the sums' place: nothing can be added after."""
        if self._waiting.count:
            self._sum_up()
        hessian, drift, count = self._hessian, self._drift, max(self._tokens, 1)
        for panel in panels(len(hessian), _PANEL):
            hessian[panel, : panel.stop] /= count
        for start in range(0, len(hessian), _BLOCK):
            rows = slice(start, start + _BLOCK)
            for left in range(0, start, _BLOCK):
                columns = slice(left, left + _BLOCK)
                hessian[columns, rows] = hessian[rows, columns].T
        if drift is not None:
            drift /= count
        return Statistics(hessian, drift, self._tokens)

    def _sum_up(self) -> None:
        """Add the products of the rows that wait: of H the lower half, which is mirrored at the end."""
        waiting, self._waiting = self._waiting, _Waiting()
        hessian, drift, rows = self._hessian, self._drift, np.concatenate(waiting.quantized)
        missing = None if drift is None else np.concatenate(waiting.float_)
        if missing is not None:
            missing -= rows

        def add(panel: slice) -> None:
            own = rows[:, panel]
            hessian[panel, panel] += own.T @ own  # NumPy sees the symmetry, and computes a half
            if panel.start:
                hessian[panel, : panel.start] += own.T @ rows[:, : panel.start]
            if drift is not None and missing is not None:
                drift[panel] += missing[:, panel].T @ rows

        spread(add, panels(len(hessian), _PANEL))
