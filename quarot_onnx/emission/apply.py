"""Every selected node written with its weight and its activation, one weight at a time."""

from dataclasses import dataclass, replace

from quarot_onnx.config.choices import OutputFormat
from quarot_onnx.emission.emit import Emitter
from quarot_onnx.emission.formats import StoredWeight
from quarot_onnx.progress import Progress
from quarot_onnx.quantization.select import LinearJob, Selection, TableJob
from quarot_onnx.quantization.static_ranges import Ranges, activation_of, fixed_grid
from quarot_onnx.rounding.lowbit import RoundedOf


@dataclass(frozen=True, eq=False)
class StoredWeights:
    """The weights of a selection, and how they are written.

    Attributes:
        rounded: Gives the weight of a node that is quantized.
        format: How they are written.
        accuracy_level: That of MatMulNBits; None computes 4-bit products in float32, and 8-bit ones, which would then
            take more than ten times the float model's time, with activations of 8 bits per block.
    """

    rounded: RoundedOf
    format: OutputFormat
    accuracy_level: int | None = None

    def of(self, job: LinearJob | TableJob) -> StoredWeight:
        """The weight of a node."""
        stored = StoredWeight(self.rounded(job), self.format, accuracy_level=self.accuracy_level)
        slow = self.accuracy_level is None and stored.stored_bits == 8
        return replace(stored, accuracy_level=4) if slow else stored


def apply_selection(
    selection: Selection, ranges: Ranges, weights: StoredWeights, progress: Progress | None = None
) -> None:
    """Quantize the selected nodes of a model in place.

    Args:
        selection: What is quantized, and of which model.
        ranges: From ``static_ranges.calibrate``.
        weights: The weights.
        progress: Called with nodes done and their number.
    """
    emitter = Emitter(selection.survey.model)
    total = len(selection.linears) + len(selection.tables)
    # Ranges go by the names that values had before any of them was touched.
    names = {job.linear.node: (job.linear.input.name or "", job.linear.output.name or "") for job in selection.linears}
    for done, job in enumerate(selection.linears, start=1):
        before, after = names[job.linear.node]
        emitter.linear(
            job.linear,
            None if job.config.weight is None else weights.of(job),
            activation_of(job.config.activation, before, ranges),
            fixed_grid(job.config.output_tensors, after, ranges) if job.config.output_tensors is not None else None,
        )
        if progress is not None:
            progress(done, total)
    for done, table in enumerate(selection.tables, start=len(selection.linears) + 1):
        emitter.table(table.node, table.table, weights.of(table))
        if progress is not None:
            progress(done, total)
