"""Round to nearest, the grid by the clip search where it is on: no statistics needed."""

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.quantization.grids import Grid, Integers
from quarot_onnx.quantization.scheme import QuantizedWeight, WeightScheme
from quarot_onnx.rounding.grids import Steps, find_grid
from quarot_onnx.rounding.tiles import column_spans, in_steps, row_blocks
from quarot_onnx.threads import spread


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
    size = scheme.group_size or max(len(weight), 1)

    def round_columns(columns: slice) -> None:
        of_grid = columns if scheme.per_channel else slice(None)
        for group, (scale, low, high, middle) in enumerate(
            zip(*(array[:, of_grid] for array in (steps.scale, steps.low, steps.high, zero)), strict=True)
        ):
            for rows in row_blocks(group * size, min((group + 1) * size, len(weight))):
                nearest = in_steps(weight[rows, columns], scale)
                np.rint(nearest, out=nearest)
                np.maximum(nearest, low, out=nearest)
                np.minimum(nearest, high, out=nearest)
                np.add(nearest, middle, out=nearest)
                np.copyto(integers[rows, columns], nearest, casting="unsafe")

    spread(round_columns, column_spans(weight.shape[1]))
    return integers
