"""Hadamard orders: exact integer orthogonality, and which orders are reached, from the definition."""

import math

import numpy as np
import pytest

from quarot_onnx.errors import ConfigError
from quarot_onnx.hadamard.orders import Series, construct, largest_block

MODEL_SIZES = [
    *(1536, 3072, 6144, 640, 2560, 5120, 896, 3584, 14336, 28672, 576, 1152, 2304, 4608, 9216, 5632, 960, 3840, 15360),
    *(17408, 4864, 9728, 5376, 21504, 12800, 25600, 6912, 13824, 27648, 8960, 17920, 18944, 11008, 29568),
    *(64, 128, 256, 2048, 4096, 8192),
]


def _prime_powers(stop: int) -> set[int]:
    primes = [p for p in range(2, stop) if all(p % d for d in range(2, p))]
    return {p**k for p in primes for k in range(1, 20) if p**k < stop}


def _reachable(stop: int) -> set[int]:
    """The closure under products of {2^k, q + 1, 2(q + 1)}, without any of the package's code."""
    fields = _prime_powers(stop)
    base = (
        {2**k for k in range(20)} | {q + 1 for q in fields if q % 4 == 3} | {2 * (q + 1) for q in fields if q % 4 == 1}
    )
    reached = {order for order in base if order < stop}
    while True:
        grown = reached | {a * b for a in reached for b in reached if a * b < stop}
        if grown == reached:
            return reached
        reached = grown


def test_exactly_the_reachable_orders_are_constructed() -> None:
    reached = {order for order in range(301) if construct(order) is not None}
    assert reached == _reachable(301)
    missing = [order for order in range(4, 301, 4) if order not in reached]
    assert missing == [92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292]


def test_every_matrix_up_to_300_is_hadamard() -> None:
    for order in range(1, 301):
        construction = construct(order)
        if construction is None:
            continue
        matrix = construction.matrix()
        assert matrix.dtype == np.int8
        assert matrix.shape == (order, order)
        assert (np.abs(matrix) == 1).all()
        # float64 sums of ±1 are exact integers far below 2^53.
        wide = matrix.astype(np.float64)
        assert (wide @ wide.T == order * np.eye(order)).all(), construction.describe()


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_sizes_of_popular_models(size: int) -> None:
    construction = construct(size)
    assert construction is not None
    assert math.prod(part.order for part in construction.parts) == size
    for part in construction.parts:  # a Kronecker product of Hadamard matrices is one
        if part.method is not Series.SYLVESTER:
            matrix = part.matrix().astype(np.float64)
            assert (np.abs(matrix) == 1).all()
            assert (matrix @ matrix.T == part.order * np.eye(part.order)).all()
    assert largest_block(size) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (1, "1 = 1 (Sylvester)"),
        (2, "2 = 2 (Sylvester)"),
        (1536, "1536 = 12 (Paley I, q=11) × 128 (Sylvester)"),
        (18944, "18944 = 148 (Paley II, q=73) × 128 (Sylvester)"),
        (11008, "11008 = 344 (Paley I, q=343) × 32 (Sylvester)"),
        (576, "576 = 12 (Paley I, q=11) × 4 (Sylvester) × 12 (Paley I, q=11)"),
        # 12·12·44 has the same largest part, but more parts
        (6336, "6336 = 36 (Paley II, q=17) × 4 (Sylvester) × 44 (Paley I, q=43)"),
        (29568, "29568 = 12 (Paley I, q=11) × 2 (Sylvester) × 28 (Paley I, q=27) × 44 (Paley I, q=43)"),
    ],
)
def test_preferred_construction(size: int, text: str) -> None:
    construction = construct(size)
    assert construction is not None
    assert construction.describe() == text


def test_sylvester_follows_its_recursion() -> None:
    matrix = np.ones((1, 1), dtype=np.int8)
    for k in range(7):
        construction = construct(2**k)
        assert construction is not None
        assert (construction.matrix() == matrix).all()
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])


@pytest.mark.parametrize("order", [-4, 0, 3, 6, 45, 92, 668])
def test_unreachable_orders(order: int) -> None:
    assert construct(order) is None


@pytest.mark.parametrize(
    ("size", "block"), [(1, 1), (45, 1), (6, 2), (92, 4), (172, 4), (184, 8), (690, 2), (668, 4), (688, 688)]
)
def test_largest_block(size: int, block: int) -> None:
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    assert block == max(set(divisors) & _reachable(size + 1))
    assert largest_block(size) == block


def test_largest_block_of_nothing() -> None:
    with pytest.raises(ConfigError, match="size 0"):
        largest_block(0)
