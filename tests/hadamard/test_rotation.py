"""Rotation: the algebra against dense products, randomisation, records and refusals.

Tolerance: float64, inputs of size 1; a sum of n ≤ 3000 products has rounding errors below 3000·1.1e-16 < 1e-12.
"""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quarot_onnx.errors import ConfigError
from quarot_onnx.hadamard import Rotation, RotationKind, construct, largest_block

TOLERANCE = 1e-12
SIZES = [1, 2, 4, 12, 20, 28, 36, 44, 48, 64, 76, 100, 144, 192, 256, 336, 576]


def _orthogonal(size: int, seed: int = 0) -> NDArray[np.float64]:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def _close(left: NDArray[np.float64], right: NDArray[np.float64]) -> bool:
    return left.shape == right.shape and bool(np.abs(left - right).max(initial=0.0) <= TOLERANCE)


@st.composite
def rotations(draw: st.DrawFn) -> Rotation:
    size = draw(st.sampled_from(SIZES))
    if draw(st.booleans()) and size < 200:
        return Rotation.dense(_orthogonal(size, draw(st.integers(0, 9))))
    blocks = [b for b in range(1, size + 1) if size % b == 0 and construct(b) is not None]
    seed = draw(st.none() | st.integers(0, 2**40))
    return Rotation.hadamard(size, seed=seed, block_size=draw(st.none() | st.sampled_from(blocks)))


@settings(deadline=None, max_examples=60)
@given(rotations(), st.lists(st.integers(0, 3), max_size=3), st.data())
def test_apply_is_the_dense_product_on_any_axis(rotation: Rotation, others: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(others)))
    shape = [*others[:axis], rotation.size, *others[axis:]]
    x = np.random.default_rng(1).standard_normal(shape)
    R = rotation.matrix()
    assert _close(R @ R.T, np.eye(rotation.size))
    for inverse, matrix in ((False, R), (True, R.T)):
        expected = np.moveaxis(np.moveaxis(x, axis, -1) @ matrix, -1, axis)
        assert _close(rotation.apply(x, axis, inverse=inverse), expected)
        assert _close(rotation.apply(x, axis - len(shape), inverse=inverse), expected)
    assert _close(rotation.apply(rotation.apply(x, axis), axis, inverse=True), x)


@pytest.mark.parametrize("size", [12, 48, 336])
def test_matrix_is_the_definition(size: int) -> None:
    construction = construct(size)
    assert construction is not None
    H = construction.matrix() / np.sqrt(size)
    plain, randomised = Rotation.hadamard(size), Rotation.hadamard(size, seed=3)
    assert _close(plain.matrix(), H)
    signs = np.sign(randomised.matrix()[:, 0] / H[:, 0])
    assert _close(randomised.matrix(), np.diag(signs) @ H)  # signs before the mixing
    assert set(signs) == {-1.0, 1.0}
    blocks = Rotation.hadamard(3 * size, block_size=size)
    assert _close(blocks.matrix(), np.kron(np.eye(3), H))


@pytest.mark.parametrize("shape", [(700, 3072), (3072, 700), (2, 3072, 400)])
def test_chunks_join_without_a_seam(shape: tuple[int, ...]) -> None:
    axis = shape.index(3072)
    x: NDArray[np.float64] = np.random.default_rng(0).standard_normal(shape)
    rotation = Rotation.hadamard(3072, seed=5)
    rotated = rotation.apply(x, axis)
    assert np.allclose(np.linalg.norm(rotated, axis=axis), np.linalg.norm(x, axis=axis), rtol=TOLERANCE, atol=0)
    other = 1 if axis == 0 else 0
    for start in range(0, shape[other], 250):  # row blocks by the caller, of another length than the chunks
        part = np.take(x, range(start, min(start + 250, shape[other])), axis=other)
        there = np.take(rotated, range(start, min(start + 250, shape[other])), axis=other)
        assert _close(rotation.apply(part, axis), there)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_float_input_is_computed_in_float64_and_kept(dtype: type) -> None:
    x: NDArray[np.floating] = np.asfortranarray(np.random.default_rng(0).standard_normal((8, 12)).astype(dtype))
    before = x.copy()
    x.setflags(write=False)
    rotated = Rotation.hadamard(12, seed=0).apply(x)
    assert rotated.dtype == np.float64
    assert (x == before).all()
    assert _close(rotated, before.astype(np.float64) @ Rotation.hadamard(12, seed=0).matrix())


def test_seeds_change_the_rotated_values_not_only_their_signs() -> None:
    x = np.random.default_rng(0).standard_normal((4, 64))
    first, again, second = (Rotation.hadamard(64, seed=seed) for seed in (0, 0, 1))
    assert (first.apply(x) == again.apply(x)).all()
    assert np.abs(np.abs(first.apply(x)) - np.abs(second.apply(x))).max() > 0.1
    assert np.abs(np.abs(first.apply(x)) - np.abs(Rotation.hadamard(64).apply(x))).max() > 0.1


def test_signs_of_a_seed_are_pinned() -> None:
    first_row_signs = np.sign(Rotation.hadamard(8, seed=0).matrix()[:, 0])
    raw = np.random.PCG64(0).random_raw(8)
    assert first_row_signs.tolist() == [-1 if value >= 2**63 else 1 for value in raw.tolist()]


def test_an_outlier_is_spread() -> None:
    spike = np.zeros(1536)
    spike[7] = 1000.0
    rotated = Rotation.hadamard(1536, seed=0).apply(spike)
    assert np.allclose(np.abs(rotated), 1000.0 / np.sqrt(1536), rtol=TOLERANCE, atol=0)


def test_value_equality_and_freezing() -> None:
    assert Rotation.hadamard(64, seed=1) == Rotation.hadamard(64, seed=1, block_size=64)
    assert hash(Rotation.hadamard(64)) == hash(Rotation.hadamard(64))
    different = [
        Rotation.hadamard(64),
        Rotation.hadamard(64, seed=1),
        Rotation.hadamard(64, block_size=8),
        Rotation.hadamard(128),
        Rotation.dense(_orthogonal(64)),
        Rotation.dense(_orthogonal(64, 1)),
    ]
    assert len(set(different)) == len(different)
    assert Rotation.dense(_orthogonal(64), origin="here") == Rotation.dense(_orthogonal(64), origin="there")
    with pytest.raises(dataclasses.FrozenInstanceError):
        different[0].size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size 0"),
        ({"size": 92}, r"order 92 is known here; use block_size=4 \(block-diagonal, 92 = 23·4\)"),
        ({"size": 184, "block_size": 92}, "order 92 is known here; use block_size=8"),
        ({"size": 64, "block_size": 24}, "block_size=24 does not divide the rotation's size 64; use block_size=64"),
        ({"size": 64, "block_size": 0}, "block_size=0"),
        ({"size": 64, "seed": -1}, "seed -1"),
    ],
)
def test_refused_hadamards(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rotation.hadamard(**arguments)


def test_the_block_size_a_refusal_names_works() -> None:
    assert (
        Rotation.hadamard(92, block_size=largest_block(92)).describe()
        == "Hadamard of size 92 in 23 blocks of 4 = 4 (Sylvester)"
    )


def test_wrong_axis_and_length() -> None:
    rotation = Rotation.hadamard(64)
    with pytest.raises(ConfigError, match=r"axis 1 of a tensor of shape \[64, 32\] has length 32, .* size 64"):
        rotation.apply(np.zeros((64, 32)))
    with pytest.raises(ConfigError, match=r"shape \[64\] has no axis 1"):
        rotation.apply(np.zeros(64), axis=1)


def test_record_survives_json() -> None:
    for rotation in (Rotation.hadamard(576), Rotation.hadamard(1536, seed=7, block_size=64)):
        assert Rotation.from_dict(json.loads(json.dumps(rotation.to_dict()))) == rotation
    assert Rotation.from_dict({"kind": "hadamard", "size": 12}) == Rotation.hadamard(12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sead": 3}, "unknown key 'sead'.*'seed'"),
        ({"kind": "fourier"}, "kind 'fourier'"),
        ({"size": "12"}, "size is '12'"),
        ({"seed": True}, "seed is True"),
        ({"size": None}, "no size"),
        ({"origin": "12 = 12 (Williamson)"}, "Williamson.*this version builds '12 = 12 "),
    ],
)
def test_refused_records(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rotation.from_dict({**Rotation.hadamard(12).to_dict(), **change})


def test_dense_record_is_not_restorable() -> None:
    rotation = Rotation.dense(_orthogonal(8), origin="learned.npy")
    assert rotation.kind is RotationKind.DENSE
    with pytest.raises(ConfigError, match=rf"learned.npy \(sha256 {rotation.sha256}\).*give its .npy file again"):
        Rotation.from_dict(rotation.to_dict())
