"""Hadamard matrices and the rotations made of them, in pure NumPy."""

from quarot_onnx.hadamard.online import OnlineFactors
from quarot_onnx.hadamard.orders import Construction, Part, Series, construct, largest_block
from quarot_onnx.hadamard.rotation import Rotation, RotationKind

__all__ = [
    "Construction",
    "OnlineFactors",
    "Part",
    "Rotation",
    "RotationKind",
    "Series",
    "construct",
    "largest_block",
]
