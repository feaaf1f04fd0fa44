"""The grid of a weight: scale and zero point from the range of its values.

    symmetric:   s = max|w| / (2^(bits-1) - 1),               z = middle
    asymmetric:  s = (max(w, 0) - min(w, 0)) / (2^bits - 1),  z = round(q_min - min(w, 0) / s)

times the shrink factor of the clip search (``clip.py``). Symmetric uint8 is symmetric int8 moved by 128, so that the
type changes no result (onnxruntime's own grid has s = max|w| / 127.5 there). A range that holds only 0 has the scale 1
and the zero point in the middle. Scales are rounded to float32 at once, and all rounding takes that value, in float64:
what is dequantized later is what was rounded against.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.errors import ModelError
from quarot_onnx.quantization.grids import Grid
from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.rounding.clip import best_factors
from quarot_onnx.rounding.tiles import column_spans, floats, row_blocks
from quarot_onnx.threads import spread

_AT_HAND = 1 << 18
"""Numbers that lie in a core's cache: one look at all of them is the fastest."""


@dataclass(frozen=True, eq=False)
class Steps:
    """A grid ready for rounding: q - z is an integer of [low, high], a weight is that times the scale.

    Attributes:
        scale: float64 [groups, out] or [1, 1].
        low: The smallest q - z, the same shape.
        high: The largest q - z, the same shape.
    """

    scale: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def of(cls, grid: Grid, scheme: WeightScheme) -> "Steps":
        """The steps of a grid."""
        zero = grid.zero_point.astype(np.float64)
        return cls(grid.scale.astype(np.float64), scheme.low - zero, scheme.high - zero)


def find_grid(weight: NDArray[np.floating], scheme: WeightScheme, name: str, *, clip: bool) -> Grid:
    """The grid of a weight.

    Args:
        weight: W: [in, out]; the last group may be shorter than the others.
        scheme: The family of grids.
        name: The Linear, for messages.
        clip: Whether to search how far to shrink the ranges.

    Returns:
        The grid; a range that holds only 0 gets the scale 1 and the zero point in the middle, which represents 0.

    Raises:
        ModelError: The weight holds NaN or infinity.
    """
    if not scheme.per_channel:
        return group_grid(weight, scheme, name, clip=clip)
    size = scheme.group_size or max(len(weight), 1)
    groups = [weight[top : top + size] for top in range(0, len(weight), size)]
    grids = spread(lambda group: group_grid(group, scheme, name, clip=clip), groups)
    return Grid(np.concatenate([grid.scale for grid in grids]), np.concatenate([grid.zero_point for grid in grids]))


def require_finite(weight: NDArray[np.floating], name: str) -> None:
    """Refuse what cannot be rounded.

    Args:
        weight: W: [in, out].
        name: The Linear, for the message.

    Raises:
        ModelError: The weight holds NaN or infinity.
    """
    _range(weight, name)


def _range(weight: NDArray[np.floating], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The smallest and the largest number of every column, [out] each."""
    low, high = np.full((2, weight.shape[1]), np.nan)

    def find(columns: slice) -> None:
        parts = (floats(weight[rows, columns]) for rows in row_blocks(0, len(weight)))
        ends = [(part.min(axis=0), part.max(axis=0)) for part in parts]
        low[columns] = np.min([least for least, _ in ends], axis=0)
        high[columns] = np.max([most for _, most in ends], axis=0)

    if weight.dtype == np.float32 and weight.size <= _AT_HAND:
        low[:], high[:] = weight.min(axis=0), weight.max(axis=0)
    else:
        spread(find, column_spans(weight.shape[1]))
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ModelError(f"the weight of {name!r} holds NaN or infinity and cannot be quantized; exclude its node")
    return low, high


def group_grid(weight: NDArray[np.floating], scheme: WeightScheme, name: str, *, clip: bool) -> Grid:
    """The grid of one group of rows: [1, out], or [1, 1] for the whole matrix; as for ``find_grid``."""
    low, high = _range(weight, name)
    if not scheme.per_channel:
        low, high = low.min(keepdims=True), high.max(keepdims=True)
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    if scheme.symmetric:
        exact = np.maximum(-low, high) / ((1 << (scheme.bits - 1)) - 1)
    else:
        exact = (high - low) / ((1 << scheme.bits) - 1)
    empty = exact < np.finfo(np.float32).tiny
    exact[empty] = 1.0
    zero = np.full(exact.shape, float(scheme.middle))
    if not scheme.symmetric:
        zero = np.where(empty, zero, np.clip(np.rint(scheme.low - low / exact), scheme.low, scheme.high))
    factors = _best_factors(weight, exact, zero, scheme) if clip else 1.0
    scale = (exact * factors).astype(np.float32)
    return Grid(np.maximum(scale, np.finfo(np.float32).tiny)[None], zero.astype(scheme.dtype)[None])


def _best_factors(
    weight: NDArray[np.floating],
    scale: NDArray[np.float64],
    zero: NDArray[np.float64],
    scheme: WeightScheme,
) -> NDArray[np.float64]:
    """The shrink factor of every scale."""
    low, high = scheme.low - zero, scheme.high - zero
    scale, low, high = (np.broadcast_to(values, weight.shape[1:]) for values in (scale, low, high))
    return best_factors(weight, scale, low, high, together=not scheme.per_channel)
