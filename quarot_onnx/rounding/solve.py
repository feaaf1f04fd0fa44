"""A weight rounded with the statistics of its inputs: tiles of its columns, each a problem of its own, side by side.

With the clip search on, a column is rounded (:mod:`.recursion`) with some multiples of the scale that the search finds,
and keeps the one whose own errors are least in the end: Σ_i (e_i / U_ii)² is (w - q)ᵀ(H + λI)(w - q), what the search,
which knows no H, is a guess at.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.calibration.hessian import Statistics
from quarot_onnx.config.rounding import HessianConfig
from quarot_onnx.errors import CalibrationError, ConfigError
from quarot_onnx.quantization.grids import Grid, Integers
from quarot_onnx.quantization.scheme import QuantizedWeight, WeightScheme
from quarot_onnx.rounding.correcting import corrected
from quarot_onnx.rounding.factor import factorise
from quarot_onnx.rounding.grids import find_grid
from quarot_onnx.rounding.recursion import Problem, Recursion, moving
from quarot_onnx.threads import spread

_TILE = 768
"""Columns of W worked on together, at most: bounds the memory of the float64 copies."""

MULTIPLES = (1.0, 0.95, 0.9)
"""Of the scale that the clip search finds: what a column is rounded with, one after the other; of equals the first."""

Tile = tuple[Integers, NDArray[np.float32], Integers]
"""Integers, scales and zero points of some columns."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """What a method gives.

    Attributes:
        weight: The integers and their grid.
        damping: λ as a fraction of the mean diagonal element of H, as finally used: larger than asked for where H could
            not be factorised otherwise, and 0 for methods without H.
    """

    weight: QuantizedWeight
    damping: float


class Helpers(Protocol):
    """Others that round tiles of columns."""

    def help(self, weight: NDArray[np.floating], problem: Problem, tiles: Sequence[slice]) -> bool:
        """Whether it is worth while to let them."""
        ...

    def rounded(
        self,
        weight: NDArray[np.floating],
        problem: Problem,
        tiles: Sequence[slice],
        work: Callable[[NDArray[np.floating], Problem], Tile],
    ) -> Iterator[Tile]:
        """What ``work`` makes of each tile of a weight, in their order."""
        ...


def pose(statistics: Statistics, scheme: WeightScheme, options: HessianConfig, name: str) -> Problem:
    """Order, damp and factorise the statistics.

    Args:
        statistics: H and D of the Linear's inputs.
        scheme: The family of grids.
        options: Damping and order.
        name: The Linear, for messages.

    Raises:
        ConfigError: act-order with groups whose grids are not static.
        CalibrationError: The statistics hold NaN or infinity, or H cannot be factorised.
    """
    if options.act_order and scheme.group_size is not None and not options.static_groups:
        raise ConfigError(
            f"act_order with group_size {scheme.group_size} would take the inputs of {name!r} out of their groups; "
            "turn static_groups on, or act_order off"
        )
    hessian, drift = statistics.hessian, statistics.drift
    if not np.isfinite(hessian).all() or (drift is not None and not np.isfinite(drift).all()):
        raise CalibrationError(
            f"the calibration inputs of {name!r} hold NaN or infinity; check the calibration data, or exclude the node"
        )
    order = np.arange(len(hessian))
    if options.act_order:
        order = np.argsort(-np.diagonal(hessian), kind="stable")
        hessian = hessian[np.ix_(order, order)]
        drift = None if drift is None else drift[np.ix_(order, order)]
    return Problem(order, factorise(hessian, options.perc_damp, name), drift)


def round_in_order(
    weight: NDArray[np.floating],
    problem: Problem,
    scheme: WeightScheme,
    options: HessianConfig,
    name: str,
    *,
    helpers: Helpers | None = None,
) -> Rounded:
    """Round all rows.

    Args:
        weight: W: [in, out], its rows in the inputs' own order.
        problem: The statistics.
        scheme: The family of grids.
        options: Block size, groups and clip search.
        name: The Linear, for messages.
        helpers: Who may do some of it; the result is the same.

    Returns:
        The integers, their grid, and the damping.

    Raises:
        ModelError: The weight holds NaN or infinity.
    """
    work = partial(round_columns, scheme=scheme, options=options, name=name)
    tiles, integers = column_tiles(weight.shape[1], _TILE), np.empty(weight.shape, scheme.dtype)
    if not scheme.per_channel:
        exact = (
            weight
            if problem.alpha is None
            else np.concatenate(spread(lambda columns: taken(weight[:, columns], problem), tiles), axis=1)
        )
        grid = find_grid(exact, scheme, name, clip=_early_clip(scheme, options))

        def round_tile(columns: slice) -> None:
            tile = exact[problem.order, columns].astype(np.float64)
            Recursion(tile, integers[:, columns], grid, problem, scheme, options, name).round()

        spread(round_tile, tiles)
        return Rounded(QuantizedWeight(scheme, integers, grid.scale, grid.zero_point), problem.factors.damping)
    scale = np.empty((scheme.groups(len(weight)), weight.shape[1]), np.float32)
    zero_point = np.empty(scale.shape, scheme.dtype)

    def put(columns: slice, found: Tile) -> None:
        integers[:, columns], scale[:, columns], zero_point[:, columns] = found

    if helpers is not None and helpers.help(weight, problem, tiles):
        for columns, found in zip(tiles, helpers.rounded(weight, problem, tiles, work), strict=True):
            put(columns, found)
    else:
        spread(lambda columns: put(columns, work(weight[:, columns], problem)), tiles)
    return Rounded(QuantizedWeight(scheme, integers, scale, zero_point), problem.factors.damping)


def round_columns(
    weight: NDArray[np.floating], problem: Problem, *, scheme: WeightScheme, options: HessianConfig, name: str
) -> Tile:
    """Round some columns, each of which has scales of its own; arguments are those of `round_in_order`."""
    part = taken(weight, problem)
    grid = find_grid(part, scheme, name, clip=_early_clip(scheme, options))
    integers, exact = np.empty(part.shape, scheme.dtype), part[problem.order].astype(np.float64)
    if not _searched(scheme, options):
        Recursion(exact, integers, grid, problem, scheme, options, name).round()
        return integers, grid.scale, grid.zero_point
    kept, tried = grid.scale.copy(), np.empty(exact.shape, scheme.dtype)
    least = np.full(exact.shape[1], np.inf)
    for number, multiple in enumerate(MULTIPLES):
        scale = np.maximum((grid.scale * multiple).astype(np.float32), np.finfo(np.float32).tiny)
        other = Grid(scale, grid.zero_point)
        costs = Recursion(exact.copy(), tried, other, problem, scheme, options, name).round()
        better = (costs < least) | (number == 0)  # also where a cost is beyond all numbers
        least[better] = costs[better]
        kept[:, better] = scale[:, better]
        integers[:, better] = tried[:, better]
    return integers, kept, grid.zero_point


def taken(weight: NDArray[np.floating], problem: Problem) -> NDArray[np.floating]:
    """What is rounded of some columns: the weight, or for Qronos, in float64, the part α of the way from w to w'."""
    if problem.alpha is None:
        return weight
    assert problem.drift is not None, "Qronos needs it"
    order, result = problem.order, np.empty(weight.shape)
    result[order] = corrected(weight[order].astype(np.float64), problem.factors, problem.drift, problem.alpha)
    return result


def column_tiles(width: int, most: int) -> list[slice]:
    """All columns, in tiles of nearly the same width, at most ``most``."""
    count = max(1, -(-width // most))
    size = max(1, -(-width // count))
    return [slice(left, min(left + size, width)) for left in range(0, width, size)]


def _early_clip(scheme: WeightScheme, options: HessianConfig) -> bool:
    """The search that is worth its time before the first row."""
    return options.mse and not moving(scheme, options)


def _searched(scheme: WeightScheme, options: HessianConfig) -> bool:
    """Whether scales are chosen by what rounding with them costs."""
    return _early_clip(scheme, options) and scheme.per_channel and scheme.bits < 8
