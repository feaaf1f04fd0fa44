"""Quadratic residues of the finite fields GF(p^k), all that Paley's matrices need of them.

The elements of GF(q), q = p^k, are numbered 0 … q−1: number e stands for the polynomial whose coefficients are
the base-p digits of e. The quadratic character is χ(0) = 0, χ(a) = 1 for a non-zero square, −1 otherwise.

With a generator g of the multiplicative group, χ(g^e) = (−1)^e. So no general multiplication is needed, only the
powers of one generator, and that generator can be x itself when the modulus is a primitive polynomial.
"""

import itertools
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=4096)
def prime_power(q: int) -> tuple[int, int] | None:
    """Writes q as p^k.

    Args:
        q: Any integer.

    Returns:
        ``(p, k)`` with p prime and k ≥ 1, or None when q is not a prime power.
    """
    if q < 2:
        return None
    prime = _smallest_prime_factor(q)
    exponent = 0
    while q % prime == 0:
        q //= prime
        exponent += 1
    return (prime, exponent) if q == 1 else None


def jacobsthal(q: int) -> NDArray[np.int8]:
    """The Jacobsthal matrix Q[i, j] = χ(a_i − a_j) over GF(q).

    Q Qᵀ = q·I − J and Q J = J Q = 0, with J all ones. Q is symmetric for q ≡ 1 (mod 4) and skew for q ≡ 3 (mod 4).

    Args:
        q: An odd prime power.

    Returns:
        Q: int8 [q, q].
    """
    character = quadratic_character(q)
    field = prime_power(q)
    assert field is not None
    prime, degree = field
    elements = np.arange(q)
    places = prime ** np.arange(degree)
    digits = elements[:, None] // places % prime
    matrix = np.empty((q, q), dtype=np.int8)
    for row in range(q):  # by rows, so that the int64 differences never stand as a whole [q, q]
        matrix[row] = character[(digits[row] - digits) % prime @ places]
    return matrix


def quadratic_character(q: int) -> NDArray[np.int8]:
    """χ of every element of GF(q).

    Args:
        q: An odd prime power.

    Returns:
        χ: int8 [q], 0 at element 0, ±1 elsewhere.
    """
    field = prime_power(q)
    assert field is not None
    assert field[0] != 2
    powers = _generator_powers(*field)
    character = np.zeros(q, dtype=np.int8)
    character[powers[0::2]] = 1
    character[powers[1::2]] = -1
    return character


def _generator_powers(prime: int, degree: int) -> list[int]:
    """The numbers of g^0, g^1, …, g^(q−2) for a generator g of GF(prime^degree)'s multiplicative group.

    Tries moduli x^k = c_0 + c_1 x + … in a fixed order. With c_0 ≠ 0, multiplication by x is a bijection, so the powers
    of x return to 1. If they do so only after q − 1 steps, every non-zero residue is a power of x and hence
    invertible: the ring is a field, and x generates its group. (For degree 1 this finds a primitive root, x = c_0.)
    """
    order = prime**degree - 1
    for modulus in itertools.product(range(prime), repeat=degree):
        if modulus[0] == 0:
            continue
        powers = _powers_of_x(prime, modulus)
        if len(powers) == order:
            return powers
    raise AssertionError(f"GF({prime}^{degree}) has no primitive polynomial")


def _powers_of_x(prime: int, modulus: tuple[int, ...]) -> list[int]:
    """The numbers of x^0, x^1, … modulo x^k = Σ modulus[j]·x^j, up to the return to 1."""
    one = (1,) + (0,) * (len(modulus) - 1)
    powers = []
    element = one
    while True:
        powers.append(sum(digit * prime**place for place, digit in enumerate(element)))
        carry = element[-1]
        shifted = (0, *element[:-1])
        element = tuple((s + carry * c) % prime for s, c in zip(shifted, modulus, strict=True))
        if element == one:
            return powers


def _smallest_prime_factor(number: int) -> int:
    """The smallest prime that divides number ≥ 2, by trial division."""
    if number % 2 == 0:
        return 2
    divisor = 3
    while divisor * divisor <= number:
        if number % divisor == 0:
            return divisor
        divisor += 2
    return number
