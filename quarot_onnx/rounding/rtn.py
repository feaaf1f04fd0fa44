"""Round to nearest, the grid by the clip search where it is on: no statistics needed."""

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.io.memory import large_array
from quarot_onnx.quantization.grids import Grid, Integers
from quarot_onnx.quantization.scheme import QuantizedWeight, WeightScheme
from quarot_onnx.rounding.grids import Steps, find_grid, group_grid
from quarot_onnx.rounding.tiles import column_spans, floats, in_steps, row_blocks
from quarot_onnx.threads import Scratch, spread

_TILE = 1 << 18
"""Weights of a group that are read once for their range, the search of it, and rounding: 1 MB as float32, and so many
that NumPy's loops take longer than what is between them."""

_CHUNK = 32768
"""Weights that are rounded together: a few passes over them stay near a core."""

_LONGEST = 512
"""Rows of such a group at most."""

_NEAR = 2.0**-20
"""So near to the middle of two integers float32 does not decide, times the integers: three roundings, of 2^-24 each."""

_LARGE = 2.0**96
"""Scales above have no reciprocal in float32 that is exact enough."""

_scratch = Scratch()

Limit = NDArray[np.float32] | np.float32


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
    rows, columns = weight.shape
    size = scheme.group_size
    if not scheme.per_channel or size is None or size > _LONGEST:
        grid = find_grid(weight, scheme, name, clip=clip)
        return QuantizedWeight(scheme, nearest_integers(weight, scheme, grid), grid.scale, grid.zero_point)
    integers = large_array(weight.shape, scheme.dtype)
    scale = np.empty((scheme.groups(rows), columns), np.float32)
    zero_point = np.empty(scale.shape, scheme.dtype)
    width = max(1, _TILE // size)

    def round_part(at: tuple[int, int]) -> None:
        group, left = at
        part = np.s_[group * size : (group + 1) * size, left : left + width]
        values = floats(weight[part], _scratch)
        grid = group_grid(values, scheme, name, clip=clip)
        scale[group, part[1]], zero_point[group, part[1]] = grid.scale[0], grid.zero_point[0]
        _round(values, Steps.of(grid, scheme), grid.zero_point, integers[part])

    spread(round_part, [(group, left) for group in range(len(scale)) for left in range(0, columns, width)])
    return QuantizedWeight(scheme, integers, scale, zero_point)


def nearest_integers(weight: NDArray[np.floating], scheme: WeightScheme, grid: Grid) -> Integers:
    """The nearest integers on a grid, [in, out].

    Args:
        weight: W: [in, out].
        scheme: The family of grids.
        grid: One of them.
    """
    steps = Steps.of(grid, scheme)
    integers = large_array(weight.shape, scheme.dtype)
    size = scheme.group_size or max(len(weight), 1)

    def round_columns(columns: slice) -> None:
        of_grid = columns if scheme.per_channel else slice(None)
        for group in range(len(steps.scale)):
            its = Steps(*(array[group : group + 1, of_grid] for array in (steps.scale, steps.low, steps.high)))
            zero = grid.zero_point[group : group + 1, of_grid]
            for rows in row_blocks(group * size, min((group + 1) * size, len(weight))):
                _round(floats(weight[rows, columns]), its, zero, integers[rows, columns])

    spread(round_columns, column_spans(weight.shape[1]))
    return integers


def _round(values: NDArray[np.floating], steps: Steps, zero_point: Integers, out: Integers) -> None:
    """Write the nearest integers: those of float64, which float32 decides but for numbers near the middle of two.

    Args:
        values: [rows, columns], C-contiguous.
        steps: Of one group: [1, columns] or [1, 1].
        zero_point: The same shape.
        out: [rows, columns].
    """
    low, high, zero = (_one_of(array.astype(np.float32)) for array in (steps.low, steps.high, zero_point))
    if steps.scale.max(initial=0.0) > _LARGE:
        _finish(np.rint(in_steps(values, steps.scale)), low, high, zero, out)
        return
    per_step = (1.0 / steps.scale).astype(np.float32)
    near = np.float32(0.5 - _NEAR * (steps.high - steps.low).max(initial=0.0))
    some = max(1, _CHUNK // values.shape[1])
    for top in range(0, len(values), some):
        part = values[top : top + some]
        nearest, apart = _scratch.array("steps", (2, *part.shape), np.float32)
        np.multiply(part, per_step, out=apart, casting="same_kind")
        np.rint(apart, out=nearest)
        np.subtract(apart, nearest, out=apart)
        np.absolute(apart, out=apart)
        close = np.flatnonzero(apart >= near)
        if len(close):
            scale = np.broadcast_to(steps.scale, part.shape)[np.divmod(close, part.shape[1])]
            nearest.reshape(-1)[close] = np.rint(part.reshape(-1)[close].astype(np.float64) / scale)
        _finish(nearest, low, high, zero, out[top : top + some])


def _finish(nearest: NDArray[np.floating], low: Limit, high: Limit, zero: Limit, out: Integers) -> None:
    """Limit rounded numbers, add the zero point, and write them."""
    if isinstance(low, np.ndarray) or isinstance(high, np.ndarray):
        np.minimum(np.maximum(nearest, low, out=nearest), high, out=nearest)
    else:
        np.clip(nearest, low, high, out=nearest)
    if isinstance(zero, np.ndarray) or zero:
        np.add(nearest, zero, out=nearest)
    np.copyto(out, nearest, casting="unsafe")


def _one_of(values: NDArray[np.float32]) -> Limit:
    """Values of columns, or the number that all of them are: NumPy is faster with one."""
    first: np.float32 = values.flat[0]
    return first if (values == first).all() else values
