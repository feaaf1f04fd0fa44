"""Online factors: they compute c·x R, exactly representable, and the weight scale undoes c.

Tolerance: float64, x of size 1; sums of n ≤ 6144 products err by less than 6144·1.1e-16·sqrt(2) < 1e-12.
"""

import math
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quarot_onnx.errors import ConfigError
from quarot_onnx.hadamard import OnlineFactors, Rotation, construct

TOLERANCE = 1e-12
ORDERS = [order for order in range(1, 400) if construct(order) is not None]


def _mix(x: NDArray[np.float64], online: OnlineFactors) -> NDArray[np.float64]:
    """The contract in its plainest spelling: y_j = Σ_i x_i F[i, j] on every axis."""
    y = x.reshape(-1, *(len(factor) for factor in online.factors))
    for axis, factor in enumerate(online.factors, start=1):
        y = np.moveaxis(np.tensordot(y, factor, axes=(axis, 0)), -1, axis)
    return y.reshape(x.shape)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(ORDERS), st.integers(1, 4), st.sampled_from([8, 32, 128]))
def test_factors_compute_the_rotation(block: int, blocks: int, max_factor: int) -> None:
    rotation = Rotation.hadamard(block * blocks, block_size=block)
    online = rotation.online(max_factor)
    x = np.random.default_rng(0).standard_normal((3, rotation.size))
    assert online.block == block
    assert math.prod(len(factor) for factor in online.factors) == block
    assert len(online.factors) <= 3
    assert np.abs(_mix(x, online) * online.weight_scale - rotation.apply(x)).max() <= TOLERANCE
    # c within a factor sqrt(2) of 1, but for the rounding of the square root
    assert 2**-0.5 * (1 - 1e-15) <= online.weight_scale <= 2**0.5 * (1 + 1e-15)


@pytest.mark.parametrize("size", [576, 1536, 4864, 5632])
def test_reshape_and_two_products(size: int) -> None:
    """Reshape to [-1, m, k], MatMul(·, B), MatMul(Aᵀ, ·): the graph's spelling."""
    online = Rotation.hadamard(size).online()
    A, B = online.factors
    x = np.random.default_rng(0).standard_normal((2, 5, size))
    y = (A.T @ (x.reshape(-1, len(A), len(B)) @ B)).reshape(x.shape)
    rotated = Rotation.hadamard(size).apply(x)
    assert np.abs(y * online.weight_scale - rotated).max() <= TOLERANCE


def test_a_transposed_factor_is_noticed() -> None:
    """Paley I matrices are not symmetric: with Aᵀ for A the result is orthogonal still, but wrong."""
    for size in (576, 1536, 4864, 12, 28, 44 * 32):
        rotation = Rotation.hadamard(size)
        online = rotation.online()
        x = np.random.default_rng(0).standard_normal((2, size))
        for index, factor in enumerate(online.factors):
            if (factor == factor.T).all():
                continue
            factors = tuple(f.T if i == index else f for i, f in enumerate(online.factors))
            wrong = OnlineFactors(size, size, factors, online.weight_scale)
            assert np.abs(_mix(x, wrong) * wrong.weight_scale - rotation.apply(x)).max() > 0.1
    assert (Rotation.hadamard(1536).online().factors[0] != Rotation.hadamard(1536).online().factors[0].T).any()


@pytest.mark.parametrize("size", [128, 576, 1536, 6144])
def test_the_folded_weight_keeps_the_product(size: int) -> None:
    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((3, size)), rng.standard_normal((size, 5)) / math.sqrt(size)
    rotation = Rotation.hadamard(size)
    online = rotation.online()
    # Rᵀ W contracts R's first axis with W's first axis: that is apply along axis 0, not its inverse.
    folded = online.weight_scale * rotation.apply(W, axis=0)
    assert np.abs(_mix(x, online) @ folded - x @ W).max() <= TOLERANCE
    if size != 128:  # Sylvester's matrix is its own transpose, these are not
        wrong = online.weight_scale * rotation.apply(W, axis=0, inverse=True)
        assert np.abs(_mix(x, online) @ wrong - x @ W).max() > 0.1


@pytest.mark.parametrize("size", [1, 12, 128, 576, 11008, 18944, 29568])
def test_entries_are_powers_of_two_exact_in_float16(size: int) -> None:
    online = Rotation.hadamard(size).online()
    exponents = []
    for factor in online.factors:
        magnitude = np.abs(factor)
        exponent = np.log2(magnitude.flat[0])
        assert (magnitude == magnitude.flat[0]).all()
        assert exponent == round(exponent)
        assert (factor.astype(np.float16).astype(np.float64) == factor).all()
        # the rows are orthonormal up to one rounding of the exponent, or two to meet the joint sum
        assert abs(exponent + math.log2(len(factor)) / 2) < 1
        exponents.append(exponent)
    assert online.weight_scale == pytest.approx(1 / (math.sqrt(size) * 2 ** sum(exponents)), rel=1e-15)


@pytest.mark.parametrize(
    ("size", "widths"),
    [
        (1, [1]),
        (64, [64]),
        (128, [128]),
        (576, [24, 24]),
        (1536, [48, 32]),
        (8192, [16, 16, 32]),
        (14336, [28, 16, 32]),
        (11008, [344, 32]),
        (18944, [148, 128]),
        (29568, [24, 28, 44]),
    ],
)
def test_chosen_widths(size: int, widths: list[int]) -> None:
    online = Rotation.hadamard(size).online()
    assert [len(factor) for factor in online.factors] == widths
    assert online.cost() == size * sum(widths)


def test_factors_are_the_construction_itself() -> None:
    construction = construct(1536)
    assert construction is not None
    signs = reduce(np.kron, (np.sign(factor) for factor in Rotation.hadamard(1536).online().factors))
    assert (signs == construction.matrix()).all()


def test_dense_rotation_is_one_factor() -> None:
    matrix = np.linalg.qr(np.random.default_rng(0).standard_normal((24, 24)))[0]
    online = Rotation.dense(matrix).online()
    assert (online.factors[0] == matrix).all()
    assert (online.block, online.weight_scale, online.cost()) == (24, 1.0, 24 * 24)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"seed 3, size 64.*plain Hadamard"):
        Rotation.hadamard(64, seed=3).online()
    with pytest.raises(ConfigError, match="max_factor=1"):
        Rotation.hadamard(64).online(max_factor=1)


def test_factors_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Rotation.hadamard(64).online().factors[0][0, 0] = 2.0
