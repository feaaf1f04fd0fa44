"""Finite fields: checked against definitions that share nothing with the implementation."""

import numpy as np
import pytest

from quarot_onnx.hadamard.gf import jacobsthal, prime_power, quadratic_character


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, None),
        (1, None),
        (2, (2, 1)),
        (27, (3, 3)),
        (49, (7, 2)),
        (343, (7, 3)),
        (45, None),
        (667, None),
        (73, (73, 1)),
    ],
)
def test_prime_power(number: int, expected: tuple[int, int] | None) -> None:
    assert prime_power(number) == expected


@pytest.mark.parametrize("q", [3, 5, 7, 11, 19, 73, 139])
def test_prime_field_residues_are_the_squares(q: int) -> None:
    squares = {i * i % q for i in range(1, q)}
    expected = [0] + [1 if a in squares else -1 for a in range(1, q)]
    assert quadratic_character(q).tolist() == expected


@pytest.mark.parametrize("q", [3, 5, 9, 25, 27, 49, 81, 121, 125, 243, 343])
def test_jacobsthal_identities(q: int) -> None:
    matrix = jacobsthal(q).astype(np.int64)
    assert (matrix @ matrix.T == q * np.eye(q, dtype=np.int64) - 1).all()
    assert (matrix.sum(axis=0) == 0).all()
    assert np.array_equal(matrix.T, matrix if q % 4 == 1 else -matrix)
