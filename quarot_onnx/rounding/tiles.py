"""Parts of a weight that stay in a core's cache while passes go over them, as floats that NumPy is fast with."""

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quarot_onnx.io.halves import widen
from quarot_onnx.threads import Scratch

_COLUMNS, _ROWS = 512, 128
"""Of a part at most: 256 kB as float32, and a row fills cache lines."""

_APART = 32

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def column_spans(width: int) -> list[slice]:
    """All columns, in spans that are worked on side by side; how they are cut depends on the width alone."""
    return [slice(left, min(left + _COLUMNS, width)) for left in range(0, width, _COLUMNS)]


def row_blocks(start: int, stop: int) -> list[slice]:
    """Rows in blocks."""
    return [slice(top, min(top + _ROWS, stop)) for top in range(start, stop, _ROWS)]


def floats(part: NDArray[np.floating], scratch: Scratch | None = None) -> NDArray[np.floating]:
    """A part of a weight, exactly: 16-bit floats as float32, others as they are; C-contiguous.

    Args:
        part: [rows, columns].
        scratch: Holds it until it is asked for the next part, if given.
    """
    if part.dtype == np.float16:
        wide = np.empty(part.shape, np.float32) if scratch is None else scratch.array("wide", part.shape, np.float32)
        widen(part.view(np.float16), wide)
        return wide
    return np.ascontiguousarray(part, np.float32 if part.dtype == _BFLOAT16 else part.dtype)


def turn(part: NDArray[np.floating], out: NDArray[np.float32]) -> None:
    """Write the transpose of a part as float32.

    Rows lie some bytes more apart than they are long meanwhile: where the distance is a power of 2, all elements of a
    column fall to the same few places of a cache.

    Args:
        part: [rows, columns].
        out: [columns, rows], C-contiguous.
    """
    rows, columns = part.shape
    half = part.dtype == np.float16
    apart = _scratch.array("half" if half else "single", (rows, columns + _APART), np.float16 if half else np.float32)
    apart = apart[:, :columns]
    np.copyto(apart, part, casting="same_kind")
    if half:
        widen(apart.T, out)
    else:
        np.copyto(out, apart.T)


def in_steps(part: NDArray[np.floating], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """A part in units of its columns' scales, float64 [rows, columns]; an array of its own.

    Args:
        part: [rows, columns].
        scale: [columns], or [1].
    """
    steps: NDArray[np.float64] = floats(part).astype(np.float64)
    return np.divide(steps, scale, out=steps)


_scratch = Scratch()
