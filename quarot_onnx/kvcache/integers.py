"""The integers of a cache, in NumPy: what the graph computes (:mod:`.joined`) and what onnxruntime does inside.

q = clip(round(x / scale)), symmetric; 4-bit ones lie two in a byte, each plus 8.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.emission.packing import pack


@dataclass(frozen=True)
class Halves:
    """How entries of a head share bytes: entry i of its first half the low bits of byte i, of its second the others.

    Attributes:
        first: Bits of those of the first half.
        second: The rest of 8.
    """

    first: int
    second: int

    @property
    def lowest(self) -> NDArray[np.float32]:
        """The smallest integer of each half, [2]."""
        return -(np.float32(2) ** np.array([self.first - 1, self.second - 1], np.float32))


ALIKE, UNLIKE = Halves(4, 4), Halves(5, 3)
"""Of entries that are spread alike; and of balanced ones, the first half of which holds most of what queries see."""

OFFSET = 8
"""What is added to a 4-bit integer."""

Floats = NDArray[np.float32]


def highest(bits: int) -> int:
    """The largest integer."""
    return (1 << (bits - 1)) - 1


def scales_of(peaks: NDArray[np.floating[Any]], bits: int, clip_ratio: float) -> Floats:
    """Scales under which peaks, times the ratio, are the largest integer; 1 where there was nothing but zeros."""
    scales = np.asarray(peaks, np.float64) * clip_ratio / highest(bits)
    return np.where(scales < np.finfo(np.float32).tiny, 1.0, scales).astype(np.float32)


def rounded(x: Floats, scales: Floats, bits: int) -> NDArray[np.int8]:
    """The integers of ``x``; ``scales`` broadcast against it."""
    top = highest(bits)
    integers: NDArray[np.int8] = np.clip(np.rint(np.asarray(x, np.float32) / scales), -top - 1, top).astype(np.int8)
    return integers


def stored(x: Floats, scales: Floats, bits: int) -> NDArray[Any]:
    """What GroupQueryAttention's cache holds of ``x`` [..., head_dim]: of 4 bits two in a byte, the even ones low."""
    integers = rounded(x, scales, bits)
    return integers if bits == 8 else pack((integers + OFFSET).astype(np.uint8), bits)
