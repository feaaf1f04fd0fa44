"""Qronos' correction of weights before they are rounded (:mod:`.qronos`).

w'_1 = w_1 + c_1 / H_11,    w'_{≥2} = w_{≥2} + (H_{≥2,≥2})⁻¹ (c_{≥2} - H_{≥2,1} c_1 / H_11),    c = Dᵀ w
"""

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.rounding.factor import Factors

_TILE, _PANEL = 384, 192
"""Columns of W corrected together, at most, and rows of a panel of the factor of H."""


def corrected(
    exact: NDArray[np.float64], factors: Factors, drift: NDArray[np.float64], alpha: float
) -> NDArray[np.float64]:
    """The part α of the way from w to w', [in, columns].

    Args:
        exact: W [in, columns], its rows in the order of the factors.
        factors: Of H + λI.
        drift: D [in, in], in that order.
        alpha: The part.
    """
    result = np.empty_like(exact)
    for left in range(0, exact.shape[1], _TILE):
        columns = np.s_[:, left : left + _TILE]
        missing = drift.T @ exact[columns]
        missing[0] /= factors.first[0]
        missing[1:] -= np.outer(factors.first[1:], missing[0])
        _solve(factors.inverse[1:, 1:], missing[1:])
        missing *= alpha
        missing += exact[columns]
        result[columns] = missing
    return result


def _solve(factor: NDArray[np.float64], right: NDArray[np.float64]) -> None:
    """Overwrite a right-hand side with UᵀU times it, leaving out most of what is zero in U."""
    tops = range(0, len(right), _PANEL)
    for top in tops:  # rows above are not needed any more
        panel = slice(top, top + _PANEL)
        right[panel] = factor[panel, top:] @ right[top:]
    for top in reversed(tops):
        panel = slice(top, top + _PANEL)
        right[panel] = factor[: top + _PANEL, panel].T @ right[: top + _PANEL]
