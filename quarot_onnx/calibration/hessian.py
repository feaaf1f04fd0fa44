"""What Hessian-aware rounding needs to know of a Linear's inputs, summed up as they pass.

    H = X̃ᵀX̃ / N,    D = (X - X̃)ᵀX̃ / N,    X, X̃: [N, in]

X̃ are the inputs on the path whose earlier weights (and, where asked for, activations) are quantized, X those of the
float model. H is the Hessian of ||X̃w - X̃q||² up to a factor (GPTQ, Frantar et al. 2022, section 3); D carries the
error of everything before the Linear (GPTAQ, Li et al. 2025; Qronos, Zhang et al. 2025, where G = X̃ᵀX / N = H + Dᵀ).
D is summed of differences: taken as the difference of two sums it would drown in the rounding of their largest entries,
which the attention sink makes many orders of magnitude larger than the rest.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import ssyrk

_ROWS = 512
"""Rows of one partial product: float32 products of so many rows, summed in float64 in a fixed order."""

_BLOCK = 1024
"""Rows of a block that is mirrored at once."""


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


class Accumulator:
    """Sums up statistics; two runs over the same rows in the same order give the same bits."""

    def __init__(self, in_features: int, *, drift: bool) -> None:
        """Start at zero.

        Args:
            in_features: Length of a row.
            drift: Whether D is wanted.
        """
        self._hessian = np.zeros((in_features, in_features), order="F")  # as BLAS gives it: adding is twice as fast
        self._drift = np.zeros((in_features, in_features)) if drift else None
        self._tokens = 0

    def add(self, quantized: NDArray[np.float32], float_: NDArray[np.float32] | None = None) -> None:
        """Add rows.

        Args:
            quantized: X̃, [rows, in].
            float_: X, [rows, in]; needed where D is wanted.
        """
        for start in range(0, len(quantized), _ROWS):
            rows = quantized[start : start + _ROWS]
            # Half of a symmetric product; the other half is filled in at the end.
            self._hessian += ssyrk(1.0, rows.T)
            if self._drift is not None:
                assert float_ is not None
                self._drift += (float_[start : start + _ROWS] - rows).T @ rows
        self._tokens += len(quantized)

    def finish(self) -> Statistics:
        """The statistics of all rows. They take the sums' place: nothing can be added after."""
        hessian, drift, count = self._hessian, self._drift, max(self._tokens, 1)
        for start in range(0, len(hessian), _BLOCK):
            stop = start + _BLOCK
            block = np.triu(hessian[start:stop, start:stop])
            hessian[start:stop, start:stop] = block + np.triu(block, 1).T
            hessian[stop:, start:stop] = hessian[start:stop, stop:].T
        hessian /= count
        if drift is not None:
            drift /= count
        return Statistics(hessian, drift, self._tokens)
