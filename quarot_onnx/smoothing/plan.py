"""The scales of SmoothQuant, and the edits that put them in.

    s_j = max|x_j|^α / max|w_j|^(1-α)    (Xiao et al. 2023, eq. 4)

x_j are the values of an input channel over the calibration tokens, w_j the weights of all readers on it. The source
makes x / s, the readers' rows become s · w. A common factor changes nothing; the scales of a place have a geometric
mean of 1, so that float16 holds them. A channel that calibration saw nothing in, or that no weight reads, has s = 1.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.config.smoothing import SmoothQuantConfig
from quarot_onnx.errors import first_and_more
from quarot_onnx.graph.linear import Linear
from quarot_onnx.graph.query import seen
from quarot_onnx.rotation.edits import Plan
from quarot_onnx.rotation.steps import WeightSteps
from quarot_onnx.rotation.transform import Scale, Shift
from quarot_onnx.smoothing.places import Place, Refused

Vector = NDArray[np.float64]


def plan_smoothing(
    places: Sequence[Place], refused: Sequence[Refused], peaks: Mapping[str, Vector], config: SmoothQuantConfig
) -> Plan:
    """Turn places and what was measured there into edits.

    Args:
        places: From `find_places`.
        refused: From there, too.
        peaks: max|x_j| of the readers' inputs by their names, [in].
        config: α.
    """
    steps = WeightSteps()
    scales: dict[str, Vector] = {}
    for place in places:
        inputs = np.max([peaks[linear.input.name or ""] for linear in place.readers], axis=0)
        weights = np.max([_row_peaks(linear) for linear in place.readers], axis=0)
        scale = _scales(_shared(inputs, place), _shared(weights, place), config.alpha)
        _absorb(steps, place, 1.0 / scale)
        spread = _spread(scale, place)
        for linear in place.readers:
            steps.weight(linear, Scale(0, ir.Tensor(spread)))
        if place.cache is not None and place.heads is not None:
            groups, _, width = place.heads
            scales[place.cache] = (1.0 / scale).reshape(groups, width)
    reasons: dict[str, list[str]] = {}
    for entry in refused:
        reasons.setdefault(entry.reason, []).append(entry.linear)
    notes = tuple(f"not smoothed: {first_and_more(names)}, as {reason}" for reason, names in reasons.items())
    caches, counts = dict.fromkeys(scales, "scales"), {"places": len(places)}
    return Plan(tuple(steps.edits()), {}, counts, notes, caches, suffix="smoothed", scales=scales)


def _row_peaks(linear: Linear) -> Vector:
    """max|w| of every input feature, [in]."""
    return np.asarray(np.abs(seen(linear.weight)).max(axis=1), np.float64)


def _scales(seen: Vector, weights: Vector, alpha: float) -> Vector:
    scale = np.ones_like(seen)
    used = (seen > 0) & (weights > 0)
    if used.any():
        logs = alpha * np.log(seen[used]) - (1 - alpha) * np.log(weights[used])
        scale[used] = np.exp(logs - logs.mean())
    return scale


def _shared(values: Vector, place: Place) -> Vector:
    """The maximum over query heads that share a KV head: [in] to the source's columns."""
    if place.heads is None:
        return values
    groups, heads, width = place.heads
    return np.asarray(values.reshape(groups, heads // groups, width).max(axis=1)).reshape(-1)


def _spread(scale: Vector, place: Place) -> Vector:
    """The reverse, from the source's columns to [in]."""
    if place.heads is None:
        return scale
    groups, heads, width = place.heads
    return np.repeat(scale.reshape(groups, 1, width), heads // groups, axis=1).reshape(-1)


def _absorb(steps: WeightSteps, place: Place, factor: Vector) -> None:
    """Multiply what the source makes."""
    source = place.source
    if isinstance(source, Linear):
        columns = np.ones(source.out_features)
        columns[place.start : place.start + len(factor)] = factor
        step = Scale(1, ir.Tensor(columns))
        steps.weight(source, step)
        if source.bias is not None:
            steps.add(source.bias.node, source.bias.index, source.bias.constant, step)
        return
    assert source.gamma is not None
    assert source.gamma_use is not None
    node, index = source.gamma_use
    if source.gamma_offset:  # the graph's own sum with it is taken out, as with a folded γ
        steps.add(node, index, source.gamma, Shift(source.gamma_offset))
    steps.add(node, index, source.gamma, Scale(1, ir.Tensor(factor)))
