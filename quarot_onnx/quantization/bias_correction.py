"""Bias correction: what quantizing adds to a Linear's output on average goes into its bias.

Of y = x W with x on a fixed grid and W rounded to Ŵ, the mean error over calibration tokens is, for each output channel
(Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction*, 2019, section 4.2),

    c = E[x W - Q(x) Ŵ] = E[x] (W - Ŵ) + (E[x] - E[Q(x)]) Ŵ

so that the means of x and Q(x) are all that has to be known. c is added to the bias, or becomes one. Corrected is what
a Linear does by itself, weights and activation both: x is the float model's, so that errors which Linears pass on to
later ones have no part in it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.fetching import Fetched
from quarot_onnx.calibration.observing import observe_samples
from quarot_onnx.calibration.readers import DataReader
from quarot_onnx.config.tensor import QTensorConfig
from quarot_onnx.graph.edit import Editor
from quarot_onnx.graph.linear import Linear, linear_at
from quarot_onnx.graph.query import seen
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.progress import Progress
from quarot_onnx.quantization.activations import Activation, round_trip
from quarot_onnx.quantization.select import LinearJob, Selection
from quarot_onnx.quantization.static_ranges import Ranges, activation_of

Sums = NDArray[np.float64]
WeightOf = Callable[[LinearJob], NDArray[np.float32]]
"""Gives the real numbers of the weight that a Linear will have, alpha in it, [in, out]."""

_BIAS = 2  # Gemm's input


@dataclass(eq=False)
class Means:
    """Takes in the rows of an activation.

    Attributes:
        activations: The ways in which it is quantized.
        count: Rows so far.
        real: Their sum, [features].
        rounded: The sum of what they are after each way of quantizing.
    """

    activations: dict[QTensorConfig, Activation] = field(default_factory=dict)
    count: int = 0
    real: Sums | float = 0.0
    rounded: dict[QTensorConfig, Sums | float] = field(default_factory=dict)

    def add(self, values: NDArray[np.float32]) -> bool:
        """Take in rows [..., features]; False where a value is not finite."""
        if not np.isfinite(values).all():
            return False
        rows = values.reshape(-1, values.shape[-1])
        self.count += len(rows)
        self.real = self.real + rows.sum(0, dtype=np.float64)
        for spec, activation in self.activations.items():
            self.rounded[spec] = self.rounded.get(spec, 0.0) + round_trip(rows, activation).sum(0, dtype=np.float64)
        return True


def corrected(
    file: str | Path,
    selection: Selection,
    ranges: Ranges,
    weight_of: WeightOf,
    reader: DataReader,
    *,
    max_samples: int | None = None,
    progress: Progress | None = None,
    memory: Memory = WHOLE,
) -> Selection:
    """Correct the biases of the Linears whose inputs have a fixed scale, in place.

    A Gemm that reads its input transposed is left as it is.

    Args:
        file: The float model's file.
        selection: What will be quantized; its graph is changed.
        ranges: From ``static_ranges.calibrate``.
        weight_of: The weights that Linears will have; asked where a weight is quantized.
        reader: Any calibration reader.
        max_samples: Stop after so many samples.
        progress: Called after every sample.
        memory: Whether the model is run piece by piece.

    Returns:
        The same selection, of the changed graph.

    Raises:
        CalibrationError: The reader is empty or cannot be read again, or an activation holds NaN or infinity.
    """
    jobs = [job for job in selection.linears if _is_fixed(job)]
    if not jobs:
        return selection
    means: dict[str, Means] = {}
    for job in jobs:
        spec, name = job.config.activation, job.linear.input.name or ""
        assert spec is not None
        means.setdefault(name, Means()).activations[spec] = activation_of(spec, name, ranges)
    loaded = model_io.load(file)
    observe_samples(Fetched(means), loaded, reader, max_samples=max_samples, progress=progress, memory=memory)
    changes = {job.linear.node: _change(job, means[job.linear.input.name or ""], weight_of) for job in jobs}
    editor = Editor(selection.survey.model)
    linears = [
        replace(job, linear=_biased(editor, job.linear, changes[job.linear.node]))
        if job.linear.node in changes
        else job
        for job in selection.linears
    ]
    return replace(selection, linears=tuple(linears))


def _is_fixed(job: LinearJob) -> bool:
    spec = job.config.activation
    return spec is not None and spec.has_fixed_scale and not job.linear.transposed_input


def _change(job: LinearJob, means: Means, weight_of: WeightOf) -> Sums:
    """What the bias lacks, [out]."""
    assert job.config.activation is not None
    real, rounded = means.real / means.count, means.rounded[job.config.activation] / means.count
    weight = seen(job.linear.weight, job.linear.alpha).astype(np.float32, copy=False)
    written = weight if job.config.weight is None else weight_of(job)
    # Sums in float64 of float32 weights, without a copy of them.
    change: Sums = np.einsum("i,ij->j", real, weight) - np.einsum("i,ij->j", rounded, written)
    return change


def _biased(editor: Editor, linear: Linear, change: Sums) -> Linear:
    """Add a vector [out] to what a Linear puts out."""
    node, bias = linear.node, linear.bias
    dtype = linear.weight.dtype if bias is None else bias.constant.dtype
    total = change if bias is None else seen(bias.constant).astype(np.float64) * linear.beta + change
    tensor = ir.Tensor(total.astype(dtype.numpy()), dtype=dtype)
    vector = editor.initializer(f"{linear.name}/corrected_bias", tensor)
    if bias is not None:
        editor.replace_input(bias.node, bias.index, vector)
    elif node.op_type == "Gemm":
        node.resize_inputs(_BIAS + 1)
        node.replace_input_with(_BIAS, vector)
    else:
        editor.redirect(node.outputs[0], lambda value: [_sum(editor, value, vector, linear.name)])
    if node.op_type == "Gemm":
        node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
    found = linear_at(node)
    assert found is not None
    return found


def _sum(editor: Editor, value: ir.Value, vector: ir.Value, name: str) -> ir.Node:
    """The node of value + vector, whose output goes by the value's name, as ranges and Linears know it."""
    node = editor.node("Add", [value, vector], f"{name}/corrected")
    output = node.outputs[0]
    output.type, output.shape = value.type, value.shape
    if not value.is_graph_output():  # of those the editor takes care
        output.name, value.name = value.name, editor.unique(f"{value.name}_uncorrected")
    return node
