"""Rotation: an orthogonal matrix R: [n, n], R @ R.T == I, acting on rows, y = x R.

Three kinds in one value: R = H/sqrt(n); randomised, R = diag(s)·H/sqrt(n); dense, given by the user. The block-diagonal
I_{n/b} ⊗ H_b/sqrt(b) stands in for an n without a known H. The signs come before the mixing: H·diag(s) would only
flip outputs and change no quantization error.

Source: S. Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (2024), section 3.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quarot_onnx.errors import ConfigError, did_you_mean
from quarot_onnx.hadamard.dense import check_matrix, load_npy, orthonormalise
from quarot_onnx.hadamard.factoring import Floats, hadamard_factors, mix_in_place
from quarot_onnx.hadamard.online import OnlineFactors, scaled_factors
from quarot_onnx.hadamard.orders import Construction, construct, largest_block

_WIDEST_FACTOR = 128
_KEYS = ("kind", "size", "seed", "block_size", "origin", "sha256")


class RotationKind(StrEnum):
    """What a rotation is made of."""

    HADAMARD = "hadamard"
    DENSE = "dense"


@dataclass(frozen=True)
class Rotation:
    """An orthogonal R: [size, size]; made by `hadamard`, `dense`, `from_npy` or `from_dict`; equal by value.

    Attributes:
        size: n.
        kind: Hadamard or dense.
        seed: Of the random signs; None for a plain rotation.
        block_size: b of a block-diagonal Hadamard rotation; None when one block spans the size.
        origin: The Hadamard construction, or where a dense matrix comes from.
        sha256: Of a dense matrix as given, little-endian float64 in C order; None for a Hadamard.
    """

    size: int
    kind: RotationKind
    seed: int | None = None
    block_size: int | None = None
    origin: str = field(default="", compare=False)
    sha256: str | None = None
    _dense: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def hadamard(cls, size: int, *, seed: int | None = None, block_size: int | None = None) -> Self:
        """R = diag(s)·H/sqrt(n), or diag(s)·(I ⊗ H_b/sqrt(b)).

        Args:
            size: n.
            seed: Draws the signs s: ±1 [n] from PCG64; None for s = 1.
            block_size: b, a divisor of n; None or n for one block.

        Returns:
            The rotation.

        Raises:
            ConfigError: size < 1, a negative seed, a block size that does not divide, or no known Hadamard matrix.
        """
        if size < 1:
            raise ConfigError(f"a rotation of size {size} is impossible; the size must be at least 1")
        if seed is not None and seed < 0:
            raise ConfigError(f"the rotation seed {seed} is negative; give 0 or more, or none for a plain Hadamard")
        if block_size is not None and (block_size < 1 or size % block_size):
            raise ConfigError(
                f"block_size={block_size} does not divide the rotation's size {size}; "
                f"use block_size={largest_block(size)} or another divisor"
            )
        block = size if block_size is None else block_size
        origin = _construction(block, size).describe()
        return cls(size, RotationKind.HADAMARD, seed, None if block == size else block, origin)

    @classmethod
    def dense(cls, matrix: ArrayLike, *, origin: str = "given matrix", tolerance: float = 1e-5) -> Self:
        """Any orthogonal matrix, a learned one for example.

        Args:
            matrix: R: [n, n]. Orthogonal within the tolerance only (a float32 file), it is replaced by the nearest
                matrix orthogonal to 1e-12, so that rotating cannot change the float model.
            origin: Where it comes from, for messages and records.
            tolerance: The largest |R Rᵀ − I| accepted.

        Returns:
            The rotation, holding its own float64 copy.

        Raises:
            ConfigError: Not square, not finite, or not orthogonal.
        """
        given = check_matrix(matrix, origin)
        digest = hashlib.sha256(given.astype("<f8", copy=False).data).hexdigest()
        exact = orthonormalise(given, origin=origin, tolerance=tolerance)
        exact.setflags(write=False)
        return cls(len(exact), RotationKind.DENSE, origin=origin, sha256=digest, _dense=exact)

    @classmethod
    def from_npy(cls, path: str | Path) -> Self:
        """A dense rotation from a .npy file.

        Args:
            path: The file, one array [n, n] saved by `numpy.save`.

        Returns:
            The rotation; its origin is the path.

        Raises:
            ConfigError: The file is missing or unreadable, or its matrix is not orthogonal.
        """
        return cls.dense(load_npy(Path(path)), origin=str(path))

    def apply(self, x: ArrayLike, axis: int = -1, *, inverse: bool = False) -> NDArray[np.float64]:
        """Multiplies one axis by R, or by Rᵀ, in float64: x R or x Rᵀ.

        A Hadamard is mixed factor by factor, in chunks: a few megabytes are needed beyond the result.

        Args:
            x: Any float array whose axis has length n; not modified. So Rᵀ W of W: [n, out] is ``apply(W, axis=0)``.
            axis: The axis to rotate.
            inverse: Multiply by Rᵀ = R⁻¹ instead of R.

        Returns:
            A new float64 array of x's shape.

        Raises:
            ConfigError: There is no such axis, or it does not have length n.
        """
        result = np.array(x, dtype=np.float64, order="C")
        if not -result.ndim <= axis < result.ndim:
            raise ConfigError(f"a tensor of shape {list(result.shape)} has no axis {axis} to rotate")
        axis %= result.ndim
        if result.shape[axis] != self.size:
            raise ConfigError(
                f"axis {axis} of a tensor of shape {list(result.shape)} has length {result.shape[axis]}, "
                f"but the rotation has size {self.size}; use a rotation of size {result.shape[axis]}"
            )
        middle = result.reshape(math.prod(result.shape[:axis]), self.size, math.prod(result.shape[axis + 1 :]))
        self.mixer(result.dtype, inverse=inverse)(middle)
        return result

    def mixer(self, dtype: np.dtype[np.floating[Any]], *, inverse: bool = False) -> Callable[[Floats], None]:
        """What overwrites the middle axis of a C-contiguous [outer, size, inner] by x R, or by x Rᵀ.

        Args:
            dtype: float32 or float64, of x and of the arithmetic.
            inverse: Multiply by Rᵀ = R⁻¹ instead of R.
        """
        factors, scale = self._factors()
        factors = tuple((factor.T if inverse else factor).astype(dtype) for factor in factors)
        signs, scales = self._signs().astype(dtype), np.array([scale], dtype)
        before, after = (scales, signs) if inverse else (signs, scales)
        return partial(mix_in_place, factors=factors, before=before, after=after)

    def matrix(self) -> NDArray[np.float64]:
        """R: float64 [n, n]; for small sizes and tests."""
        return self.apply(np.eye(self.size))

    def online(self, max_factor: int = _WIDEST_FACTOR) -> OnlineFactors:
        """The factors that compute c·x R in a graph.

        Args:
            max_factor: The widest factor wanted (irreducible Hadamard parts may exceed it).

        Returns:
            Power-of-two scaled Hadamard factors; for a dense rotation R itself, with c = 1.

        Raises:
            ConfigError: The rotation is randomised, or max_factor < 2.
        """
        if max_factor < 2:
            raise ConfigError(f"max_factor={max_factor} is too narrow for an online Hadamard; use at least 2")
        if self.seed is not None:
            raise ConfigError(
                f"a randomised rotation (seed {self.seed}, size {self.size}) cannot be applied online; "
                "use a plain Hadamard, without a seed"
            )
        if self._dense is not None:
            return OnlineFactors(self.size, self.size, (self._dense,), 1.0)
        block = self.block_size or self.size
        return scaled_factors(self.size, hadamard_factors(_construction(block, self.size), max_factor))

    def describe(self) -> str:
        """For example ``randomised Hadamard (seed 0) of 1536 = 12 (Paley I, q=11) × 128 (Sylvester)``."""
        if self.kind is RotationKind.DENSE:
            return f"dense rotation of size {self.size} from {self.origin}"
        signs = "Hadamard" if self.seed is None else f"randomised Hadamard (seed {self.seed})"
        blocks = "" if self.block_size is None else f"size {self.size} in {self.size // self.block_size} blocks of "
        return f"{signs} of {blocks}{self.origin}"

    def to_dict(self) -> dict[str, str | int | None]:
        """What to record of the rotation: JSON types only. A dense matrix is recorded by its sha256."""
        return {
            "kind": self.kind.value,
            "size": self.size,
            "seed": self.seed,
            "block_size": self.block_size,
            "origin": self.origin,
            "sha256": self.sha256,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, object]) -> Self:
        """Restores a Hadamard rotation from its record.

        Args:
            record: As `to_dict` made it; ``seed``, ``block_size`` and ``origin`` may be absent.

        Returns:
            The same rotation.

        Raises:
            ConfigError: An unknown key or kind, a wrong type, a construction that this version would not build, or a
                dense rotation, of which only the hash is recorded.
        """
        for key in record:
            if key not in _KEYS:
                raise ConfigError(f"unknown key {key!r} in a rotation record{did_you_mean(key, _KEYS)}")
        kind = record.get("kind")
        if kind == RotationKind.DENSE:
            raise ConfigError(
                f"the dense rotation from {record.get('origin')} (sha256 {record.get('sha256')}) is recorded by its "
                "hash only; give its .npy file again"
            )
        if kind != RotationKind.HADAMARD:
            raise ConfigError(f"a rotation record has the kind {kind!r}; it must be 'hadamard' or 'dense'")
        size = _whole_number(record, "size")
        if size is None:
            raise ConfigError("a rotation record has no size; give the length of the rotated axis")
        restored = cls.hadamard(
            size, seed=_whole_number(record, "seed"), block_size=_whole_number(record, "block_size")
        )
        origin = record.get("origin")
        if origin is not None and origin != restored.origin:
            raise ConfigError(
                f"the recorded rotation is built as {origin!r}, this version builds {restored.origin!r}; "
                "use the version that wrote the record"
            )
        return restored

    def _factors(self) -> tuple[tuple[NDArray[np.float64], ...], float]:
        """Factors and scale: R without its signs is I ⊗ scale·(F_1 ⊗ F_2 ⊗ …)."""
        if self._dense is not None:
            return (self._dense,), 1.0
        block = self.block_size or self.size
        return hadamard_factors(_construction(block, self.size), _WIDEST_FACTOR), 1.0 / math.sqrt(block)

    def _signs(self) -> NDArray[np.float64]:
        """s: float64 [n] of ±1; [1] of 1 for a plain rotation."""
        return np.ones(1) if self.seed is None else _random_signs(self.seed, self.size)


@lru_cache(maxsize=16)
def _random_signs(seed: int, size: int) -> NDArray[np.float64]:
    """±1 [size] from the top bits of PCG64: NumPy keeps that stream the same for ever, a Generator's it may change."""
    bits = np.random.PCG64(seed).random_raw(size) >> np.uint64(63)
    signs = 1.0 - 2.0 * bits.astype(np.float64)
    signs.setflags(write=False)
    return signs


def _construction(block: int, size: int) -> Construction:
    """The Hadamard matrix of one block, or the reason why there is none and the way out."""
    found = construct(block)
    if found is None:
        fallback = largest_block(size)
        raise ConfigError(
            f"no Hadamard matrix of order {block} is known here; use block_size={fallback} (block-diagonal, "
            f"{size} = {size // fallback}·{fallback}), a dense orthogonal matrix, or exclude this rotation"
        )
    return found


def _whole_number(record: Mapping[str, object], key: str) -> int | None:
    """An integer or nothing from a record."""
    value = record.get(key)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ConfigError(f"the rotation record's {key} is {value!r}; it must be a whole number")
