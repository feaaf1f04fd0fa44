"""Round to nearest, the grid by the clip search where it is on: no statistics needed."""

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.quantization.grids import Grid, Integers
from quarot_onnx.quantization.scheme import QuantizedWeight, WeightScheme
from quarot_onnx.rounding.grids import Steps, find_grid


def round_to_nearest_weight(
    weight: NDArray[np.floating], scheme: WeightScheme, name: str, *, clip: bool
) -> QuantizedWeight:
    """Round every weight on its own.

    Args:
        weight: W: [in, out].
        scheme: The family of grids.
        name: The Linear, for messages.
        clip: Whether to search how far to shrink the ranges.

    Returns:
        The integers and their grid.

    Raises:
        ModelError: The weight holds NaN or infinity.
    """
    grid = find_grid(weight, scheme, name, clip=clip)
    return QuantizedWeight(scheme, nearest_integers(weight, scheme, grid), grid.scale, grid.zero_point)


def nearest_integers(weight: NDArray[np.floating], scheme: WeightScheme, grid: Grid) -> Integers:
    """The nearest integers on a grid, [in, out].

    Args:
        weight: W: [in, out].
        scheme: The family of grids.
        grid: One of them.
    """
    steps = Steps.of(grid, scheme)
    zero = grid.zero_point.astype(np.float64)
    integers = np.empty(weight.shape, scheme.dtype)
    size = scheme.group_size or len(weight)
    rows = min(size, max(1, 2**18 // max(1, weight.shape[1])))
    for group in range(len(grid.scale)):
        end = min((group + 1) * size, len(weight))
        for top in range(group * size, end, rows):
            part = slice(top, min(top + rows, end))
            nearest = np.rint(weight[part] / steps.scale[group])
            integers[part] = np.clip(nearest, steps.low[group], steps.high[group]) + zero[group]
    return integers
