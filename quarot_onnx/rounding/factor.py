"""The triangular factor of a Hessian that rounding in sequence needs.

    H + λI = V Vᵀ,   U = V⁻¹,   (H + λI)⁻¹ = Uᵀ U,   U and V upper triangular

U is the upper Cholesky factor of the inverse (GPTQ, Frantar et al. 2022, section 3.3); it is had from one Cholesky
factorisation of H, rows and columns in reverse order, and one triangular inversion: the inverse itself, which would
square the loss of digits, is never formed. The trailing block of U belongs to the trailing block of H.

λ is ``damping`` times the mean of H's diagonal. An input that was zero in all tokens has a zero row, column and
diagonal element; 1 is put on the diagonal, so that its weights neither act on the others nor are acted upon, and the
mean is that of the others. Such weights are rounded to nearest: they are worth keeping, since the input may be live in
other text, and X_i may be live on the float path where X̃_i was rounded away (then D's row i counts).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.errors import CalibrationError

_SMALLEST_RAISED = 1e-4
_LARGEST = 1.0

_SLICE = 1 << 15
"""Numbers that are put in reverse order at a time."""


@dataclass(frozen=True, eq=False)
class Factors:
    """A factorised Hessian.

    Attributes:
        inverse: U, upper triangular float64 [in, in].
        first: The first row of H + λI, [in].
        damping: λ as a fraction of the mean diagonal element, as it was finally used.
    """

    inverse: NDArray[np.float64]
    first: NDArray[np.float64]
    damping: float


def factorise(hessian: NDArray[np.float64], damping: float, name: str) -> Factors:
    """Damp and factorise a Hessian; where that fails, the damping is raised tenfold, up to 1.

    Args:
        hessian: H, symmetric [in, in], finite.
        damping: λ as a fraction of the mean diagonal element.
        name: The Linear, for messages.

    Returns:
        The factor, and the damping that was enough.

    Raises:
        CalibrationError: H cannot be factorised with any damping.
    """
    diagonal = np.diagonal(hessian)
    dead = diagonal == 0.0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    filled = np.where(dead, 1.0, diagonal)
    while True:
        factors = _try_to_factorise(hessian, filled + damping * mean, damping)
        if factors is not None:
            return factors
        if damping >= _LARGEST:
            raise CalibrationError(
                f"the Hessian of {name!r} is not positive definite even with damping {damping:g}; "
                "calibrate on more or other text, or exclude the node"
            )
        damping = min(10.0 * max(damping, _SMALLEST_RAISED), _LARGEST)


def _try_to_factorise(hessian: NDArray[np.float64], diagonal: NDArray[np.float64], damping: float) -> Factors | None:
    """The factors of a Hessian with another diagonal; None where it is not positive definite to working precision."""
    from scipy.linalg import lapack  # noqa: PLC0415 - a fifth of a second that most runs can do without

    reverse = np.array(hessian[::-1, ::-1], order="C").T  # H is symmetric: its transpose comes without a copy
    np.fill_diagonal(reverse, diagonal[::-1])
    lower, info = lapack.dpotrf(reverse, lower=1, clean=1, overwrite_a=1)
    if info != 0 or not np.isfinite(lower).all():
        return None
    # What is left of a diagonal element after the others were eliminated; less than rounding leaves no true digit.
    if (np.diagonal(lower)[::-1] ** 2 <= len(diagonal) * np.finfo(np.float64).eps * diagonal).any():
        return None
    inverse, info = lapack.dtrtri(lower, lower=1, overwrite_c=1)
    if info != 0 or not np.isfinite(inverse).all():
        return None
    _reverse(inverse)
    return Factors(inverse, np.concatenate([diagonal[:1], hessian[0, 1:]]), damping)


def _reverse(matrix: NDArray[np.float64]) -> None:
    """Put rows and columns of a contiguous matrix in reverse order: its numbers, as they lie, from back to front."""
    flat = matrix.reshape(-1, order="A")
    assert np.shares_memory(flat, matrix), "not contiguous"
    half = len(flat) // 2
    for start in range(0, half, _SLICE):
        stop = min(start + _SLICE, half)
        front, back = flat[start:stop], flat[len(flat) - stop : len(flat) - start]
        held = front[::-1].copy()
        front[:] = back[::-1]
        back[:] = held
