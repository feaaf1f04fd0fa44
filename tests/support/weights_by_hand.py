"""The rounding methods once more: unblocked, one row at a time, with explicit inverses, as in the papers."""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.calibration.hessian import Accumulator, Statistics
from quarot_onnx.config.rounding import HessianConfig, QronosConfig
from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.rounding.grids import find_grid

Matrix = NDArray[np.float64]


def inputs(rows: int, features: int, *, drift: float = 0.1, seed: int = 0) -> tuple[Matrix, Matrix]:
    """Correlated X and X̃, [rows, features], float32 values."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((features, features)) * np.geomspace(1.0, 0.03, features)[:, None]
    exact = rng.standard_normal((rows, features)) @ mixing
    moved = exact + drift * (rng.standard_normal(exact.shape) + exact @ rng.standard_normal((features, features)) / 4)
    return exact.astype(np.float32).astype(np.float64), moved.astype(np.float32).astype(np.float64)


def statistics(exact: Matrix, moved: Matrix) -> Statistics:
    accumulator = Accumulator(moved.shape[1], drift=True)
    accumulator.add(moved.astype(np.float32), exact.astype(np.float32))
    return accumulator.finish()


def clipped_scale(column: Matrix, scheme: WeightScheme, *, clip: bool) -> tuple[float, float, Matrix]:
    """Scale and zero point of one group of one column, and the errors of all shrink factors, in float64."""
    low, high = min(column.min(), 0.0), max(column.max(), 0.0)
    if high - low == 0.0:
        return 1.0, float(scheme.middle), np.zeros(1)
    best, errors = (np.inf, 0.0, 0.0), []
    for i in range(80 if clip else 1):
        p = 1 - i / 100
        if scheme.symmetric:
            scale, zero = p * max(-low, high) / (2 ** (scheme.bits - 1) - 1), float(scheme.middle)
        else:
            scale = p * (high - low) / (2**scheme.bits - 1)
            zero = np.round(scheme.low - p * low / scale)
        q = np.clip(np.round(column / scale) + zero, scheme.low, scheme.high)
        errors.append(float((np.abs(column - scale * (q - zero)) ** 2.4).sum()))
        if errors[-1] < best[0]:
            best = errors[-1], scale, zero
    return best[1], best[2], np.array(errors)


class Grids:
    """The grid of every input row, found when and where a method asks for it."""

    def __init__(self, weight: Matrix, scheme: WeightScheme, options: HessianConfig, multiple: float) -> None:
        self.scheme, self.clip = scheme, options.mse
        self.size = scheme.group_size or len(weight)
        self.moving = scheme.group_size is not None and not options.static_groups
        grid = find_grid(weight, scheme, "w", clip=self.clip)
        scale = (grid.scale * np.float32(multiple)).astype(np.float32)
        self.scale, self.zero = scale.astype(np.float64), grid.zero_point.astype(np.float64)

    def round(self, weight: Matrix, row: int) -> tuple[Matrix, Matrix]:
        """The integers and values of ``weight[row]``; ``weight`` has what is not rounded yet up to date."""
        group = row // self.size
        if self.moving and row % self.size == 0:
            one = WeightScheme(self.scheme.bits, symmetric=self.scheme.symmetric, signed=self.scheme.signed)
            grid = find_grid(weight[row : row + self.size], one, "w", clip=self.clip)
            self.scale[group], self.zero[group] = grid.scale[0], grid.zero_point[0]
        scale, zero = self.scale[group], self.zero[group]
        integers = np.clip(np.rint(weight[row] / scale) + zero, self.scheme.low, self.scheme.high)
        return integers, scale * (integers - zero)


def ordered(found: Statistics, options: HessianConfig) -> tuple[list[int], Matrix, Matrix]:
    """The order of the rows, the damped H (dead inputs with a 1), and D, both in the inputs' own order."""
    diagonal = np.diag(found.hessian)
    hessian = found.hessian + np.diag(np.where(diagonal == 0, 1.0, 0.0))
    hessian = hessian + options.perc_damp * diagonal[diagonal > 0].mean() * np.eye(len(diagonal))
    order = sorted(range(len(diagonal)), key=lambda i: -diagonal[i]) if options.act_order else range(len(diagonal))
    assert found.drift is not None
    return list(order), hessian, found.drift


Once = Callable[[float], tuple[Matrix, Matrix]]
"""A method with a multiple of the scales that the clip search finds: integers, and what each column costs."""


def cheapest(once: Once, scheme: WeightScheme, options: HessianConfig) -> Matrix:
    """The integers of each column with the multiple that costs it least, where scales are chosen that way."""
    moving = scheme.group_size is not None and not options.static_groups
    chosen = options.mse and scheme.per_channel and scheme.bits < 8 and not moving
    tries = [once(multiple) for multiple in ((1.0, 0.95, 0.9) if chosen else (1.0,))]
    best = np.argmin([costs for _, costs in tries], axis=0)
    return np.stack([tries[number][0][:, column] for column, number in enumerate(best)], axis=1)


def gptq_by_hand(
    weight: Matrix, found: Statistics, scheme: WeightScheme, options: HessianConfig, alpha: float = 0.0
) -> Matrix:
    """OBQ's elimination in a fixed order (Frantar 2022, equation 2) with GPTAQ's term (Li 2025, section 3)."""
    return cheapest(partial(_gptq_once, weight, found, scheme, options, alpha), scheme, options)


def _gptq_once(
    weight: Matrix, found: Statistics, scheme: WeightScheme, options: HessianConfig, alpha: float, multiple: float
) -> tuple[Matrix, Matrix]:
    order, hessian, drift = ordered(found, options)
    weight, grids = weight.copy(), Grids(weight, scheme, options, multiple)
    integers, costs = np.empty_like(weight), np.zeros(weight.shape[1])
    for step, row in enumerate(order):
        left, later = order[step:], order[step + 1 :]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        integers[row], rounded = grids.round(weight, row)
        costs += (weight[row] - rounded) ** 2 / inverse[0, 0]
        if later:
            carried = drift[row, later] @ np.linalg.inv(hessian[np.ix_(later, later)])
            weight[later] += alpha * np.outer(carried, weight[row])
            weight[later] -= np.outer(inverse[1:, 0] / inverse[0, 0], weight[row] - rounded)
    return integers, costs


def qronos_by_hand(weight: Matrix, found: Statistics, scheme: WeightScheme, options: QronosConfig) -> Matrix:
    """Each q given the best real completion so far, each completion by least squares given the q (Zhang 2025).

    G is H + α Dᵀ, that of inputs whose error is α times as large.
    """
    return cheapest(partial(_qronos_once, weight, found, scheme, options), scheme, options)


def _qronos_once(
    weight: Matrix, found: Statistics, scheme: WeightScheme, options: QronosConfig, multiple: float
) -> tuple[Matrix, Matrix]:
    order, damped, drift = ordered(found, options)
    features = len(weight)
    hessian = damped[np.ix_(order, order)]
    target = (hessian + options.alpha * drift[np.ix_(order, order)].T) @ weight[order]  # G w
    current, integers, rounded = weight[order].copy(), np.empty_like(weight), np.empty_like(weight)
    corrected, grids, start = np.empty_like(current), None, current
    for row in range(features):
        later, earlier = slice(row + 1, features), slice(0, row)
        known = hessian[row, earlier] @ rounded[earlier] + hessian[row, later] @ current[later]
        current[row] = (target[row] - known) / hessian[row, row]
        if grids is None:
            # The grids are those of the real matrix w' whose GPTQ is Qronos: q_1 is left real, the rest completed.
            start = current.copy()
            gap = target[later] - np.outer(hessian[later, row], current[row])
            start[later] = np.linalg.solve(hessian[later, later], gap)
            corrected[order] = start
            grids = Grids(corrected, scheme, options, multiple)
        else:
            corrected[order] = current
        integers[order[row]], rounded[row] = grids.round(corrected, order[row])
        if row + 1 < features:
            gap = target[later] - hessian[later, : row + 1] @ rounded[: row + 1]
            current[later] = np.linalg.solve(hessian[later, later], gap)
    missed = start - rounded
    return integers, np.einsum("ij,ij->j", missed, hessian @ missed)
