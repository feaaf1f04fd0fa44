"""How far rounding alone moves a model's outputs, seen on the model itself.

Where the residual stream has massive activations, a single position may turn on the last bits of its inputs: SmolLM2 in
float16 moves a logit by a twentieth of the largest there, and all others by a tenth of that. No fixed tolerance tells
such a position from a fault. The model does: its vectors of weights (norms, biases) are moved by one rounding of its
type, up or down by chance, which puts noise of that size on what every Linear reads, and it is compared with itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quarot_onnx.evaluation.measures import Measures
from quarot_onnx.evaluation.sides import Opening, Sides
from quarot_onnx.evaluation.tolerance import Tolerance
from quarot_onnx.io import model_io

_STEPS = {
    ir.DataType.DOUBLE: 2.0**-52,
    ir.DataType.FLOAT: 2.0**-23,
    ir.DataType.FLOAT16: 2.0**-10,
    ir.DataType.BFLOAT16: 2.0**-7,
}
"""From 1 to the next number of a type."""

_DRAWS = 3
_FACTOR = 4
"""How often two rounded models may differ by what one rounding of these vectors does: weights and activations of all
layers are rounded otherwise, and the draws are few."""

_MOST = 0.5
"""More than half of the largest value is no rounding, whatever the draws say."""


@dataclass
class OwnNoise:
    """What rounding does to one output of a model, the most of some draws.

    Attributes:
        max_rel: ``max |b - a| / max |a|``.
    """

    max_rel: float = 0.0

    def add(self, measures: Measures) -> None:
        """Take in a draw; one that overflows tells nothing."""
        if np.isfinite(measures.max_rel):
            self.max_rel = max(self.max_rel, measures.max_rel)

    def widened(self, limits: Tolerance) -> Tolerance:
        """Limits that leave room for it; a relative L2 error averages over all positions, and keeps its own."""
        return replace(limits, max_rel=max(limits.max_rel, min(_FACTOR * self.max_rel, _MOST)))


def own_noise(
    path: str | Path, model: ir.Model, sides: Sides, opening: Callable[[ir.Model], Opening], dtype: ir.DataType
) -> dict[str, OwnNoise] | None:
    """The noise of every output that is compared, and under the name ``""`` that of the main ones.

    Args:
        path: The first model's file.
        model: What was loaded of it.
        sides: What it and another one are run on.
        opening: Opens a model that is like it.
        dtype: The type whose rounding it is.

    Returns:
        The noise; None where the graph has no vectors of weights.

    Raises:
        ModelError: The model cannot be run.
    """
    found: dict[str, OwnNoise] = {}
    itself = sides.of_the_first()
    for seed in range(_DRAWS):
        moved = _moved(path, dtype, seed)
        if moved is None:
            return None
        figures = itself.measured(opening(model), opening(moved))
        for item in figures.outputs:
            found.setdefault(item.compared.name, OwnNoise()).add(item.measures)
        found.setdefault("", OwnNoise()).add(figures.main)
    return found


def _moved(path: str | Path, dtype: ir.DataType, seed: int) -> ir.Model | None:
    """The model, its vectors of weights moved by a rounding of a type, up or down by chance."""
    model, rng, step = model_io.load(path), np.random.default_rng(seed), _STEPS[dtype]
    vectors = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and value.const_value.shape.rank() == 1
        and value.const_value.size > 1
    ]
    for value in vectors:
        assert value.const_value is not None
        array = value.const_value.numpy()
        wide = array.astype(np.float64) * (1 + step * rng.choice((-1, 1), array.shape))
        value.const_value = ir.Tensor(wide.astype(array.dtype), name=value.name)
    return model if vectors else None
