"""Splits a Hadamard matrix into a few Kronecker factors of convenient width, and mixes arrays with them.

H = F_1 ⊗ F_2 ⊗ … with F_i: [m_i, m_i]. Viewing x: [n] as [m_1, m_2, …], x H is one small product per axis:
n·Σ m_i multiply-adds instead of n².

Which split: a matrix product narrower than 16 is no cheaper than one of 16, one wider than 128 loses to two
factors, and one factor more costs, in overhead and memory traffic, about as much as 32 columns more. So, among all
splits into at most three factors, the best has

1. the fewest factors outside 16 … 128 (irreducible parts such as 148 or 344 cannot be cut),
2. then the smallest Σ (m_i + 32),
3. then the fewest and the most equal factors.

With onnxruntime on two CPU cores, 256 rows of 4096 take 1.4 ms as 16·16·16 and 2.7 ms as 64·64, 256 rows of 1536
take 0.42 ms as 48·32 and 0.61 ms as 12·8·16; for a single row all splits lie within a quarter of each other.
"""

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.hadamard.orders import Construction, Part, Series
from quarot_onnx.threads import Scratch

Floats = NDArray[np.floating[Any]]

_MOST_FACTORS = 3
_NARROWEST = 16
_COLUMNS_PER_FACTOR = 32
_CHUNK_ELEMENTS = 1 << 19
"""Numbers that are mixed together: with what is made of them they stay in a processor's cache."""

_scratch = Scratch()


@lru_cache(maxsize=64)
def hadamard_factors(construction: Construction, max_factor: int) -> tuple[NDArray[np.float64], ...]:
    """The ±1 factors of a Hadamard matrix, chosen by the rule of this module.

    Args:
        construction: The matrix H: [n, n].
        max_factor: The widest factor wanted; wider ones occur only where an irreducible part leaves no choice.

    Returns:
        At most three read-only float64 matrices [m_i, m_i] of entries ±1 whose Kronecker product is H.
    """
    groups = min(_consecutive_groups(_atoms(construction)), key=lambda groups: _rank(groups, max_factor))
    return _matrices(groups)


def all_splits(construction: Construction) -> dict[tuple[int, ...], tuple[NDArray[np.float64], ...]]:
    """All factors that ``hadamard_factors`` chooses from, by their widths."""
    ways = _consecutive_groups(_atoms(construction))
    return {tuple(math.prod(part.order for part in group) for group in groups): _matrices(groups) for groups in ways}


def _matrices(groups: Sequence[Sequence[Part]]) -> tuple[NDArray[np.float64], ...]:
    factors = []
    for group in groups:
        factor = reduce(np.kron, (part.matrix() for part in group)).astype(np.float64)
        factor.setflags(write=False)
        factors.append(factor)
    return tuple(factors)


def mix_in_place(x: Floats, factors: Sequence[Floats], *, before: Floats, after: Floats) -> None:
    """Overwrites x[p, :, t] by after · ((before · x[p, :, t]) (I ⊗ F_1 ⊗ F_2 ⊗ …)), in the precision of all of them.

    Args:
        x: float32 or float64, C-contiguous [outer, n, inner], overwritten, in chunks that stay in a cache.
        factors: F_i: [m_i, m_i], Π m_i a divisor of n.
        before: [n] or [1], multiplies the middle axis before the mixing.
        after: [n] or [1], multiplies it after the mixing.
    """
    outer, size, inner = x.shape
    across = min(inner, max(1, _CHUNK_ELEMENTS // size))
    deep = min(outer, max(1, _CHUNK_ELEMENTS // (size * max(1, across))))
    room = _scratch.array("room", (2, deep * size * across), x.dtype)
    for start in range(0, outer, max(1, deep)):
        for column in range(0, inner, max(1, across)):
            chunk = x[start : start + deep, :, column : column + across]
            here, there = room[:, : chunk.size]
            np.multiply(chunk, before[:, None], out=here.reshape(chunk.shape))
            mixed = _mix(here, there, factors, chunk.shape[2])
            np.multiply(mixed.reshape(chunk.shape), after[:, None], out=chunk)


def _mix(here: Floats, there: Floats, factors: Sequence[Floats], inner: int) -> Floats:
    """The middle axis of ``here``, [outer, n, inner], mixed by I ⊗ F_1 ⊗ F_2 ⊗ … from the right: in one of the two."""
    trailing = math.prod(len(factor) for factor in factors) * inner
    for factor in factors:
        width = len(factor)
        trailing //= width
        # One large product for the last axis; a batch of products [width, width] @ [width, trailing] for the others.
        if trailing == 1:
            np.matmul(here.reshape(-1, width), factor, out=there.reshape(-1, width))
        else:
            np.matmul(factor.T, here.reshape(-1, width, trailing), out=there.reshape(-1, width, trailing))
        here, there = there, here
    return here


def _atoms(construction: Construction) -> list[Part]:
    """The parts with the Sylvester part cut down to 2 × 2, left to right."""
    atoms: list[Part] = []
    for part in construction.parts:
        if part.method is Series.SYLVESTER:
            atoms += [Part(2, Series.SYLVESTER)] * (part.order.bit_length() - 1)
        else:
            atoms.append(part)
    return atoms or [Part(1, Series.SYLVESTER)]


def _consecutive_groups(atoms: list[Part]) -> list[list[list[Part]]]:
    """All ways to cut the atoms into at most three runs (neighbours only: ⊗ does not commute)."""
    ways = []
    for cuts in range(min(_MOST_FACTORS, len(atoms))):
        for inside in itertools.combinations(range(1, len(atoms)), cuts):
            bounds = [0, *inside, len(atoms)]
            ways.append([atoms[start:stop] for start, stop in itertools.pairwise(bounds)])
    return ways


def _rank(groups: list[list[Part]], max_factor: int) -> tuple[int, int, int, int, list[int]]:
    """Smallest is best; the rule in the module docstring."""
    widths = [math.prod(part.order for part in group) for group in groups]
    misfits = sum(not _NARROWEST <= width <= max_factor for width in widths)
    cost = sum(widths) + _COLUMNS_PER_FACTOR * len(widths)
    return misfits, cost, len(widths), max(widths), widths
