"""Every selected node written with its weight and its activation, one weight at a time.

8-bit weights are rounded to nearest as they are written, others were rounded beforehand
(:mod:`quarot_onnx.rounding.lowbit`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.calibration.ranges import Progress
from quarot_onnx.config.choices import OutputFormat
from quarot_onnx.config.enums import QuantGranularity
from quarot_onnx.config.spec import QTensorConfig
from quarot_onnx.emission.emit import Emitter, WeightGrid
from quarot_onnx.emission.formats import Given
from quarot_onnx.graph.query import label
from quarot_onnx.quantization.grids import Grid, IntegerType, weight_grid
from quarot_onnx.quantization.select import Selection
from quarot_onnx.quantization.static_ranges import Ranges, activation_of, fixed_grid
from quarot_onnx.rounding.store import RoundedWeight


@dataclass(frozen=True, eq=False)
class GivenWeights:
    """Weights that were rounded beforehand.

    Attributes:
        weights: By node name, every selected one that is quantized.
        format: How they are written.
        accuracy_level: That of MatMulNBits; None computes 4-bit products in float32, and 8-bit ones, which would then
            take more than ten times the float model's time, with activations of 8 bits per block.
    """

    weights: Mapping[str, RoundedWeight]
    format: OutputFormat
    accuracy_level: int | None = None

    def of(self, name: str) -> Given:
        """The weight of a node."""
        given = Given(self.weights[name], self.format, accuracy_level=self.accuracy_level)
        slow = self.accuracy_level is None and given.stored_bits == 8
        return replace(given, accuracy_level=4) if slow else given


def apply_selection(
    selection: Selection,
    ranges: Ranges,
    progress: Progress | None = None,
    given: GivenWeights | None = None,
) -> None:
    """Quantize the selected nodes of a model in place.

    Args:
        selection: What is quantized, and of which model.
        ranges: From ``static_ranges.calibrate``.
        progress: Called with nodes done and their number.
        given: The weights; None to round each to nearest, to 8 bits, when it is written.
    """
    emitter = Emitter(selection.survey.model)
    total = len(selection.linears) + len(selection.tables)
    # Ranges go by the names that values had before any of them was touched.
    names = {job.linear.node: (job.linear.input.name or "", job.linear.output.name or "") for job in selection.linears}
    for done, job in enumerate(selection.linears, start=1):
        before, after = names[job.linear.node]
        emitter.linear(
            job.linear,
            _weight(job.config.weight, job.linear.name, given),
            activation_of(job.config.activation, before, ranges),
            fixed_grid(job.config.output_tensors, after, ranges) if job.config.output_tensors is not None else None,
        )
        if progress is not None:
            progress(done, total)
    for done, table in enumerate(selection.tables, start=len(selection.linears) + 1):
        weight = _weight(table.weight, label(table.node), given)
        assert weight is not None, "a table has nothing else to quantize"
        emitter.table(table.node, table.table, weight)
        if progress is not None:
            progress(done, total)


def _weight(spec: QTensorConfig | None, name: str, given: GivenWeights | None) -> WeightGrid | Given | None:
    """The weight of a node as the emitter takes it; None leaves it in float."""
    if spec is None:
        return None
    return _nearest(spec, name) if given is None else given.of(name)


def _nearest(spec: QTensorConfig, name: str) -> WeightGrid:
    per_channel = spec.quant_granularity is QuantGranularity.Channel
    integers = IntegerType(signed=spec.data_type.signed)

    def grid(weight: NDArray[np.floating]) -> Grid:
        return weight_grid(weight, integers, symmetric=spec.symmetric, per_channel=per_channel, name=name)

    return grid
