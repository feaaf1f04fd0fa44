"""Rounded weights on disk, one file each, so that a model's integers never lie in memory together.

A file appears whole or not at all: what a killed run leaves can be trusted by the next.
"""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.quantization.grids import Grid
from quarot_onnx.quantization.scheme import QuantizedWeight, WeightScheme


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """A rounded weight, which is read or computed when it is needed.

    Attributes:
        scheme: Its family of grids.
        shape: (in, out).
        grid: Its scales and zero points, without its integers.
        load: All of it.
    """

    scheme: WeightScheme
    shape: tuple[int, int]
    grid: Callable[[], Grid]
    load: Callable[[], QuantizedWeight]


class WeightStore:
    """A folder of rounded weights."""

    def __init__(self, folder: Path) -> None:
        """Use ``folder``, which exists."""
        self._folder = folder

    def put(self, name: str, weight: QuantizedWeight) -> RoundedWeight:
        """Write a weight.

        Args:
            name: The name of its node.
            weight: The integers and their grids.

        Returns:
            The weight, to be read back.
        """
        path = self._path(name)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(
                file,
                integers=weight.integers,
                scale=weight.scale,
                zero_point=weight.zero_point,
            )
        partial.replace(path)
        return self._rounded(path, weight.scheme, weight.integers.shape)

    def find(self, name: str, scheme: WeightScheme, shape: tuple[int, ...]) -> RoundedWeight | None:
        """The weight of a node that is already there, or None, also where its file is damaged.

        Args:
            name: The name of its node.
            scheme: Its family of grids.
            shape: (in, out).
        """
        path = self._path(name)
        return self._rounded(path, scheme, shape) if _is_whole(path) else None

    def require(self, name: str, scheme: WeightScheme, shape: tuple[int, ...]) -> RoundedWeight:
        """As ``find``, for a weight that must be there.

        Raises:
            FileNotFoundError: It is not, or is damaged.
        """
        found = self.find(name, scheme, shape)
        if found is None:
            raise FileNotFoundError(f"the rounded weight of {name!r} is missing")
        return found

    def dequantized(
        self, places: Sequence[tuple[str, WeightScheme, tuple[int, ...]]]
    ) -> tuple[NDArray[np.float32], ...]:
        """What weights that are there have become, float32 [in, out] each.

        Args:
            places: Name, family of grids and shape of each.
        """
        return tuple(
            self._rounded(self._path(name), scheme, shape).load().dequantized() for name, scheme, shape in places
        )

    def _path(self, name: str) -> Path:
        # Node names hold slashes and may be of any length.
        return self._folder / f"{sha256(name.encode()).hexdigest()[:32]}.npz"

    @staticmethod
    def _rounded(path: Path, scheme: WeightScheme, shape: tuple[int, ...]) -> RoundedWeight:
        def load() -> QuantizedWeight:
            with np.load(path) as content:
                return QuantizedWeight(scheme, content["integers"], content["scale"], content["zero_point"])

        def grid() -> Grid:
            with np.load(path) as content:
                return Grid(content["scale"], content["zero_point"])

        rows, columns = shape
        return RoundedWeight(scheme, (rows, columns), grid, load)


def _is_whole(path: Path) -> bool:
    """Whether all members of an archive are there, with the checksums that they were written with."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError, ValueError):
        return False
