"""Dense rotations: exact ones kept, float32 ones mended, others refused."""

from pathlib import Path

import numpy as np
import pytest

from quarot_onnx.errors import ConfigError
from quarot_onnx.hadamard import Rotation

EXACT = np.linalg.qr(np.random.default_rng(0).standard_normal((96, 96)))[0]


def test_an_exact_matrix_is_kept_bit_for_bit_and_copied() -> None:
    matrix = EXACT.copy()
    rotation = Rotation.dense(matrix)
    matrix[:] = 0.0
    assert (rotation.matrix() == EXACT).all()
    assert rotation.describe() == "dense rotation of size 96 from given matrix"


def test_a_float32_matrix_becomes_its_polar_factor() -> None:
    stored = EXACT.astype(np.float32)
    assert np.abs(stored.astype(np.float64) @ stored.astype(np.float64).T - np.eye(96)).max() > 1e-9
    R = Rotation.dense(stored).matrix()
    assert np.abs(R @ R.T - np.eye(96)).max() <= 1e-12
    left, _, right = np.linalg.svd(stored.astype(np.float64))
    assert np.abs(R - left @ right).max() <= 1e-12  # the polar factor by its definition


def test_npy_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "learned.npy"
    np.save(path, EXACT)
    rotation = Rotation.from_npy(path)
    assert rotation == Rotation.dense(EXACT)
    assert rotation.origin == str(path)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.zeros((3, 4)), r"shape \[3, 4\]; it must be square"),
        (np.zeros((0, 0)), r"shape \[0, 0\]"),
        (np.zeros(4), r"shape \[4\]"),
        (np.full((2, 2), np.nan), "NaN"),
        (2.0 * np.eye(3), "deviates from I by up to 3, more than the tolerance 1e-05"),
        (np.eye(2) * 1j, "complex"),
        ([["a", "b"], ["c", "d"]], "no matrix of numbers"),
    ],
)
def test_refused_matrices(matrix: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Rotation.dense(matrix, origin="here")  # type: ignore[arg-type]
    assert "from here" in str(caught.value)


def test_a_wide_tolerance_cannot_force_a_singular_matrix() -> None:
    with pytest.raises(ConfigError, match="too far from orthogonal to be mended"):
        Rotation.dense(np.zeros((4, 4)), tolerance=2.0)
    with pytest.raises(ConfigError, match="too far from orthogonal to be mended"):
        Rotation.dense(5.0 * np.eye(4), tolerance=100.0)


def test_refused_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.npy does not exist"):
        Rotation.from_npy(tmp_path / "absent.npy")
    garbage = tmp_path / "garbage.npy"
    garbage.write_bytes(b"not an array")
    with pytest.raises(ConfigError, match=r"garbage.npy cannot be read"):
        Rotation.from_npy(garbage)
    garbage.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"garbage.npy cannot be read"):
        Rotation.from_npy(garbage)
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match=r"pickled.npy cannot be read"):
        Rotation.from_npy(pickled)
    np.savez(tmp_path / "archive.npz", EXACT)
    with pytest.raises(ConfigError, match=r"archive.npz is an archive"):
        Rotation.from_npy(tmp_path / "archive.npz")
