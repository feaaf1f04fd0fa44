"""The ranges of static activations.

Calibration runs the float model once over the reader's samples and keeps a minimum and a maximum per tensor.

The graph is then written by :mod:`quarot_onnx.emission.apply`. onnxruntime's own ``quantize_static`` gives the same
grids from the same ranges (a test holds the two together), but it loads every weight several times over, and quantizes
the Hadamards and attention's MatMuls unless told otherwise.
"""

from collections.abc import Mapping
from functools import partial

import onnx_ir as ir

from quarot_onnx.calibration.decoding import Decoding
from quarot_onnx.calibration.elsewhere import Elsewhere
from quarot_onnx.calibration.fetching import Fetched
from quarot_onnx.calibration.observing import observe_samples
from quarot_onnx.calibration.ranges import Range, RangeRule, collect_ranges
from quarot_onnx.calibration.readers import DataReader, wrap
from quarot_onnx.calibration.sample import never_seen
from quarot_onnx.config.enums import CalibMethod
from quarot_onnx.config.spec import QTensorConfig
from quarot_onnx.errors import CalibrationError
from quarot_onnx.graph.query import seen
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.progress import Progress
from quarot_onnx.quantization.activations import Activation, FakePerToken, FakeStatic, PerToken, Static, on_fixed_grid
from quarot_onnx.quantization.grids import IntegerType
from quarot_onnx.quantization.select import LinearJob, Selection
from quarot_onnx.quantization.serving import SampledRows

Ranges = Mapping[tuple[str, RangeRule], Range]
"""Ranges by tensor name, and how they were found."""


def needs_calibration(selection: Selection) -> bool:
    """Whether any activation or output gets a fixed grid."""
    return bool(_observed(selection))


def can_be_spread(selection: Selection) -> bool:
    """Whether the ranges can be put together from those of parts of the samples; Auto draws rows of all of them."""
    return all(rule.method is not CalibMethod.Auto for rule in _observed(selection))


def require_reader(selection: Selection, reader: DataReader | None) -> None:
    """Refuse a selection that needs calibration data where there are none.

    Raises:
        CalibrationError: Something is calibrated, and the reader is missing, none, or empty.
    """
    if not needs_calibration(selection):
        return
    if reader is None:
        raise CalibrationError(
            "static activation quantization needs calibration data: pass a CalibrationDataReader, quantize activations "
            "per token, or leave activations out for weight-only"
        )
    wrap(reader).require_sample()


def calibrate(
    selection: Selection,
    reader: DataReader | None,
    *,
    max_samples: int | None = None,
    progress: Progress | None = None,
    decoding: Decoding | None = None,
    memory: Memory = WHOLE,
    elsewhere: Elsewhere | None = None,
) -> dict[tuple[str, RangeRule], Range]:
    """The ranges that the selection needs.

    Args:
        selection: What will be quantized, of a model that was loaded; its graph is as its file holds it.
        reader: Any onnxruntime calibration reader.
        max_samples: Stop after so many samples.
        progress: Called with samples done and, where known, their number.
        decoding: Makes the decode steps that count, too; None for none.
        memory: Whether the model is run piece by piece.
        elsewhere: Workers that run the samples, where they can (``can_be_spread``); None where that is done here.

    Raises:
        CalibrationError: No reader, an empty one, or one that cannot be read twice where two methods need it.
    """
    checked = None if reader is None else wrap(reader)
    require_reader(selection, checked)
    loaded = selection.survey.model
    observed = _observed(selection)
    if checked is None or not observed:
        return {}
    ranges: dict[tuple[str, RangeRule], Range] = {}
    observe = partial(observe_samples, max_samples=max_samples, progress=progress, decoding=decoding, memory=memory)
    ranges_of = partial(
        collect_ranges,
        max_samples=max_samples,
        progress=progress,
        decoding=decoding,
        memory=memory,
        elsewhere=elsewhere,
    )
    for number, (rule, wanted) in enumerate(observed.items()):
        if number:
            checked.rewind()
        if rule.method is CalibMethod.Auto:
            takers = {name: SampledRows() for name in wanted}
            observe(Fetched(takers), loaded, checked)
            found = {name: _best(name, takers[name], rule, readers) for name, readers in wanted.items()}
        else:
            names = list(wanted)
            found = ranges_of(loaded, names, checked, rule=rule)
        ranges |= {(name, rule): found[name] for name in wanted}
    return ranges


def _best(name: str, taker: SampledRows, rule: RangeRule, readers: list[LinearJob]) -> Range:
    """The range that serves the Linears best that read a tensor."""
    if not taker.count:
        raise never_seen(name)
    specs = [job.config.activation for job in readers if job.config.activation is not None]
    weights = [partial(seen, job.linear.weight) for job in readers]
    return taker.best(rule, weights, signed=bool(specs) and specs[0].data_type.signed)


def _observed(selection: Selection) -> dict[RangeRule, dict[str, list[LinearJob]]]:
    """The tensors to observe, by how their range is found, and the Linears that read each."""
    wanted: dict[RangeRule, dict[str, list[LinearJob]]] = {}

    def want(spec: QTensorConfig | None, value: ir.Value, reader: LinearJob | None) -> None:
        if spec is None or not spec.has_fixed_scale:
            return
        readers = wanted.setdefault(RangeRule.of(spec), {}).setdefault(value.name or "", [])
        if reader is not None:
            readers.append(reader)

    for job in selection.linears:
        want(job.config.activation, job.linear.input, job)
        want(job.config.output_tensors, job.linear.output, None)
    return wanted


def activation_of(spec: QTensorConfig | None, name: str, ranges: Ranges) -> Activation:
    """What the finished model does to an activation.

    Args:
        spec: How it is quantized; None leaves it in float.
        name: The value's name, which its range goes by.
        ranges: From ``calibrate``.
    """
    if spec is None:
        return None
    if spec.has_fixed_scale:
        return _fixed(spec, name, ranges)
    if spec.bits == 8 and spec.symmetric and spec.group_size is None:
        return PerToken(spec.clip_ratio)
    return FakePerToken(spec.bits, spec.symmetric, spec.group_size, spec.clip_ratio)


def fixed_grid(spec: QTensorConfig, name: str, ranges: Ranges) -> Static:
    """The fixed grid of a value, of 8 or 16 bits.

    Args:
        spec: How it is quantized.
        name: The value's name, which its range goes by.
        ranges: From ``calibrate``.
    """
    kind = _fixed(spec, name, ranges)
    assert isinstance(kind, Static), spec
    return kind


def _fixed(spec: QTensorConfig, name: str, ranges: Ranges) -> Static | FakeStatic:
    found = ranges[name, RangeRule.of(spec)]
    low, high = found.min * spec.clip_ratio, found.max * spec.clip_ratio
    return on_fixed_grid(low, high, IntegerType(spec.data_type.signed, spec.bits), symmetric=spec.symmetric)
