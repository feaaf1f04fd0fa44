"""Which Hadamard orders exist here, and how each is built.

The Kronecker product of Hadamard matrices of orders m_1 and m_2 is one of order m_1·m_2. So the orders reached are
the products of 2^k (Sylvester), q + 1 (Paley I) and 2(q + 1) (Paley II). The first multiples of four beyond that
are 92, 116 and 156: their matrices are known, but of other kinds; no matrix of order 668 is known at all.

Of all constructions of an order, the one whose largest Paley part is smallest is taken, then the one with the
fewest Paley parts: a Paley part is mixed by a dense product, a Sylvester part factors down to 2 × 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache, reduce

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.errors import ConfigError
from quarot_onnx.hadamard.paley import paley_one, paley_one_field, paley_two, paley_two_field, sylvester

_SMALLEST_BLOCK = 4
"""A fall-back to blocks of 1 or 2 would mix next to nothing."""


class Series(StrEnum):
    """How an irreducible Hadamard matrix is built."""

    SYLVESTER = "Sylvester"
    PALEY_I = "Paley I"
    PALEY_II = "Paley II"


@dataclass(frozen=True)
class Part:
    """One factor of a Kronecker product.

    Attributes:
        order: The size m of the ±1 matrix [m, m].
        method: How it is built.
        q: The size of Paley's field; None for Sylvester.
    """

    order: int
    method: Series
    q: int | None = None

    def matrix(self) -> NDArray[np.int8]:
        """H: int8 [order, order], H Hᵀ = order·I."""
        if self.q is None:
            return sylvester(self.order)
        return paley_one(self.q) if self.method is Series.PALEY_I else paley_two(self.q)

    def describe(self) -> str:
        """For example ``12 (Paley I, q=11)``."""
        field = "" if self.q is None else f", q={self.q}"
        return f"{self.order} ({self.method}{field})"


@dataclass(frozen=True)
class Construction:
    """A Hadamard matrix as a Kronecker product.

    Attributes:
        order: The size n, the product of the parts' orders.
        parts: Left to right: the smallest Paley part, at most one Sylvester part, the other Paley parts ascending.
            The Sylvester part stands between, because it can be split, and each side lent to the neighbour when
            `factoring` looks for factors of equal width.
    """

    order: int
    parts: tuple[Part, ...]

    def matrix(self) -> NDArray[np.int8]:
        """H: int8 [order, order], H Hᵀ = order·I. Takes order² bytes: for small orders."""
        return reduce(np.kron, (part.matrix() for part in self.parts))

    def describe(self) -> str:
        """For example ``1536 = 12 (Paley I, q=11) × 128 (Sylvester)``."""
        return f"{self.order} = " + " × ".join(part.describe() for part in self.parts)


@lru_cache(maxsize=1024)
def construct(order: int) -> Construction | None:
    """Finds the preferred construction of a Hadamard matrix; deterministic.

    Args:
        order: The size n.

    Returns:
        The construction, or None when Sylvester, Paley and their products do not reach the order (every order
        that is neither 1, 2 nor a positive multiple of 4 among them).
    """
    if order < 1:
        return None
    splits = list(_paley_splits(order, _paley_parts(order)))
    if not splits:
        return None
    paley = min(splits, key=_preference)
    power_of_two = order
    for part in paley:
        power_of_two //= part.order
    middle = (Part(power_of_two, Series.SYLVESTER),) if power_of_two > 1 or not paley else ()
    ascending = paley[::-1]
    return Construction(order, ascending[:1] + middle + ascending[1:])


def usual_block(size: int) -> int | None:
    """The blocks of a rotation whose blocks nobody asked for.

    Args:
        size: The size n ≥ 1 to be rotated.

    Returns:
        n itself where `construct` reaches it, else the largest block; None where that would mix next to nothing.
    """
    block = largest_block(size)
    return block if block == size > 1 or block >= _SMALLEST_BLOCK else None


def missing(order: int) -> str:
    """Says that there is no matrix of an order that `construct` does not reach, as far as that is true."""
    if order % 4:
        return f"no Hadamard matrix of order {order} is known"  # nor can there be one
    return f"no Hadamard matrix of order {order} that this tool can build"


def largest_block(size: int) -> int:
    """The largest block of a block-diagonal Hadamard rotation.

    Args:
        size: The size n ≥ 1 to be rotated.

    Returns:
        The largest divisor of size that `construct` reaches; 1 for an odd size.

    Raises:
        ConfigError: size < 1.
    """
    if size < 1:
        raise ConfigError(f"a rotation of size {size} has no blocks; give a size of at least 1")
    return next(divisor for divisor in reversed(_divisors(size)) if construct(divisor) is not None)


def _preference(paley: tuple[Part, ...]) -> tuple[int, int, tuple[int, ...]]:
    """Smallest is best: the largest Paley order, their number, and the orders for a unique answer."""
    orders = tuple(part.order for part in paley)
    return max(orders, default=0), len(orders), orders


def _paley_splits(rest: int, parts: tuple[Part, ...]) -> Iterator[tuple[Part, ...]]:
    """All multisets of parts whose product divides rest and leaves a power of two."""
    if rest & (rest - 1) == 0:
        yield ()
        return
    for index, part in enumerate(parts):
        if rest % part.order == 0:
            for tail in _paley_splits(rest // part.order, parts[index:]):
                yield (part, *tail)


def _paley_parts(order: int) -> tuple[Part, ...]:
    """The Paley matrices whose order divides the given one and is no power of two, the largest first."""
    found = []
    for divisor in reversed(_divisors(order)):
        if divisor % 4 or divisor & (divisor - 1) == 0:
            continue
        if (q := paley_one_field(divisor)) is not None:
            found.append(Part(divisor, Series.PALEY_I, q))
        elif (q := paley_two_field(divisor)) is not None:
            found.append(Part(divisor, Series.PALEY_II, q))
    return tuple(found)


def _divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = []
    divisor = 1
    while divisor * divisor <= number:
        if number % divisor == 0:
            small.append(divisor)
        divisor += 1
    large = [number // divisor for divisor in reversed(small) if divisor * divisor != number]
    return small + large
