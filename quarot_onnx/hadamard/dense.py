"""Orthogonal matrices from outside (learned rotations), checked and made orthogonal to float64.

A rotation stored in float32 is orthogonal to about 1e-6 only, and would change the float model by as much. The nearest
orthogonal matrix is its polar factor U Vᵀ; Newton–Schulz, R ← (3 I − R Rᵀ) R / 2, converges to it quadratically
and needs only products (N. J. Higham, "Functions of Matrices", SIAM 2008, section 8.3).
"""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quarot_onnx.errors import ConfigError
from quarot_onnx.io.links import refuse_broken

_EXACT = 1e-12  # largest |R Rᵀ − I|; n·eps is 1e-12 at n = 4500, and errors add up far slower than n


def check_matrix(matrix: ArrayLike, origin: str) -> NDArray[np.float64]:
    """A copy of a user's matrix in float64, C order.

    Args:
        matrix: [n, n].
        origin: Where it comes from, for messages.

    Returns:
        float64 [n, n].

    Raises:
        ConfigError: Not a real, finite, square, non-empty matrix.
    """
    if np.iscomplexobj(matrix):
        raise ConfigError(f"the rotation from {origin} is complex; give a real orthogonal matrix")
    try:
        values = np.array(matrix, dtype=np.float64, order="C")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the rotation from {origin} is no matrix of numbers: {error}") from error
    if values.ndim != 2 or values.shape[0] != values.shape[1] or values.size == 0:
        raise ConfigError(f"the rotation from {origin} has shape {list(values.shape)}; it must be square, [n, n]")
    if not np.isfinite(values).all():
        raise ConfigError(f"the rotation from {origin} has infinite or NaN entries; give a finite orthogonal matrix")
    return values


def orthonormalise(matrix: NDArray[np.float64], *, origin: str, tolerance: float) -> NDArray[np.float64]:
    """The orthogonal matrix nearest to a nearly orthogonal one.

    Args:
        matrix: R: float64 [n, n].
        origin: Where it comes from, for messages.
        tolerance: The largest |R Rᵀ − I| accepted as rounding.

    Returns:
        The matrix itself where it is orthogonal to 1e-12, else its polar factor.

    Raises:
        ConfigError: R Rᵀ deviates from I by more than the tolerance, or so much that the polar steps do not converge.
    """
    deviation = _deviation(matrix)
    if not deviation <= tolerance:
        raise ConfigError(
            f"the rotation from {origin} is not orthogonal: R Rᵀ deviates from I by up to {deviation:.3g}, "
            f"more than the tolerance {tolerance:.3g}; orthonormalise it first, by a QR or polar decomposition"
        )
    result = matrix
    while deviation > _EXACT:
        result = 1.5 * result - 0.5 * (result @ result.T) @ result
        before, deviation = deviation, _deviation(result)
        if deviation > before / 2:  # converging steps square it
            raise ConfigError(
                f"the rotation from {origin} is too far from orthogonal to be mended (R Rᵀ deviates from I by up to "
                f"{before:.3g}); orthonormalise it first, by a QR or polar decomposition"
            )
    return result


def load_npy(path: Path) -> NDArray[np.generic]:
    """Reads one array from a .npy file, never unpickling anything.

    Args:
        path: The file.

    Returns:
        The array as stored.

    Raises:
        ConfigError: The file is missing, unreadable, or no plain .npy array.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        refuse_broken(Path(path).absolute(), ConfigError)
        raise ConfigError(f"the rotation file {path} does not exist; give a .npy file") from error
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"the rotation file {path} cannot be read as a .npy array of numbers: {error}") from error
    if not isinstance(loaded, np.ndarray):
        loaded.close()
        raise ConfigError(f"the rotation file {path} is an archive of arrays; give one array, saved by numpy.save")
    return loaded


def _deviation(matrix: NDArray[np.float64]) -> float:
    """The largest |R Rᵀ − I|."""
    gram = matrix @ matrix.T
    gram[np.diag_indices_from(gram)] -= 1.0
    return float(np.abs(gram).max())
