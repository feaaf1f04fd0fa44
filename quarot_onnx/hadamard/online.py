"""The factors of an online rotation, exact in every float dtype of a graph.

An online rotation computes y = c·x R with R = H/sqrt(n), H = H_1 ⊗ H_2 ⊗ …, one matrix product per factor
F_i = 2^−k_i · H_i. Powers of two are exact in float16 and bfloat16. The exponents are chosen together, so that
c = sqrt(n)·2^−Σk_i lies in [1/sqrt(2), sqrt(2)]: activations keep their size, and only 1/c goes into the next weight,
W ← (1/c) Rᵀ W, which leaves y W = x W_before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class OnlineFactors:
    """y = c·x R as one small product per axis; compared by identity.

    View x: [..., size] as [-1, m_1, …, m_f] and mix each axis, y_j = Σ_i x_i F[i, j]. For two factors (A = factors[0],
    B = factors[1]) that is Reshape to [-1, m_1, m_2], MatMul(·, B), MatMul(Aᵀ, ·): y = c·x R = x (A ⊗ B).

    Attributes:
        size: n, the length of the rotated axis.
        block: Π m_i: n, or the block size of a block-diagonal rotation (the view takes care of it).
        factors: Read-only float64 matrices [m_i, m_i]; for a Hadamard rotation every entry is ±2^−k.
        weight_scale: 1/c, to be multiplied into the weight behind: W ← weight_scale · Rᵀ W.
    """

    size: int
    block: int
    factors: tuple[NDArray[np.float64], ...]
    weight_scale: float

    def cost(self) -> int:
        """Multiply-adds per row: n·Σ m_i."""
        return self.size * sum(len(factor) for factor in self.factors)


def scaled_factors(size: int, hadamards: Sequence[NDArray[np.float64]]) -> OnlineFactors:
    """Scales ±1 factors by powers of two to nearly orthonormal ones.

    Args:
        size: n, a multiple of the product of the factors' widths.
        hadamards: The ±1 factors H_i: [m_i, m_i].

    Returns:
        The online factors F_i = 2^−k_i H_i.
    """
    widths = [len(hadamard) for hadamard in hadamards]
    block = math.prod(widths)
    exponents = _joint_exponents(widths)
    factors = []
    for hadamard, exponent in zip(hadamards, exponents, strict=True):
        factor = np.ldexp(hadamard, -exponent)
        factor.setflags(write=False)
        factors.append(factor)
    return OnlineFactors(size, block, tuple(factors), 2.0 ** sum(exponents) / math.sqrt(block))


def _joint_exponents(widths: Sequence[int]) -> list[int]:
    """k_i near log2(m_i)/2 whose sum is the integer nearest to log2(Π m_i)/2."""
    ideal = [math.log2(width) / 2 for width in widths]
    exponents = [math.floor(value) for value in ideal]
    missing = math.floor(sum(ideal) + 0.5) - sum(exponents)
    by_remainder = sorted(range(len(widths)), key=lambda index: exponents[index] - ideal[index])
    for index in by_remainder[:missing]:
        exponents[index] += 1
    return exponents
