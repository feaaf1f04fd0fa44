"""The irreducible Hadamard matrices: Sylvester's and Paley's two.

A Hadamard matrix H of order m has entries ±1 and H Hᵀ = m·I. With Q the Jacobsthal matrix of GF(q):

* Sylvester: m = 2^k, H[i, j] = (−1)^popcount(i & j).
* Paley I (q ≡ 3 mod 4): m = q + 1, H = I + S with the skew S = [[0, 1ᵀ], [−1, Q]]; S Sᵀ = q·I, so
  H Hᵀ = I + S + Sᵀ + S Sᵀ = (q + 1)·I. H is not symmetric.
* Paley II (q ≡ 1 mod 4): m = 2(q + 1), H = C ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]] with the symmetric
  C = [[0, 1ᵀ], [1, Q]], C Cᵀ = q·I.

Source: R. E. A. C. Paley, "On orthogonal matrices", J. Math. Phys. 12 (1933).
"""

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.hadamard.gf import jacobsthal, prime_power


def paley_one_field(order: int) -> int | None:
    """The q of Paley's first construction of this order, or None when there is none."""
    q = order - 1
    return q if q % 4 == 3 and prime_power(q) is not None else None


def paley_two_field(order: int) -> int | None:
    """The q of Paley's second construction of this order, or None when there is none."""
    if order % 2:
        return None
    q = order // 2 - 1
    return q if q % 4 == 1 and prime_power(q) is not None else None


def sylvester(order: int) -> NDArray[np.int8]:
    """Sylvester's matrix.

    Args:
        order: A power of two, 1 included.

    Returns:
        H: int8 [order, order], symmetric.
    """
    index = np.arange(order, dtype=np.uint32)
    parity = np.bitwise_count(index[:, None] & index) & 1
    return np.where(parity, np.int8(-1), np.int8(1))


def paley_one(q: int) -> NDArray[np.int8]:
    """Paley's first matrix.

    Args:
        q: A prime power ≡ 3 (mod 4).

    Returns:
        H: int8 [q + 1, q + 1].
    """
    matrix = np.ones((q + 1, q + 1), dtype=np.int8)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = jacobsthal(q)
    np.fill_diagonal(matrix, 1)
    return matrix


def paley_two(q: int) -> NDArray[np.int8]:
    """Paley's second matrix.

    Args:
        q: A prime power ≡ 1 (mod 4).

    Returns:
        H: int8 [2(q + 1), 2(q + 1)], symmetric.
    """
    conference = np.ones((q + 1, q + 1), dtype=np.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = jacobsthal(q)
    off_diagonal = np.array([[1, 1], [1, -1]], dtype=np.int8)
    on_diagonal = np.array([[1, -1], [-1, -1]], dtype=np.int8)
    matrix: NDArray[np.int8] = np.kron(conference, off_diagonal) + np.kron(np.eye(q + 1, dtype=np.int8), on_diagonal)
    return matrix
