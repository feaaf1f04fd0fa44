"""The smoothing of a run: what is measured, and the edits of the graph."""

from pathlib import Path

from quarot_onnx.calibration.peaks import collect_peaks
from quarot_onnx.calibration.readers import DataReader, wrap
from quarot_onnx.config.smoothing import SmoothQuantConfig
from quarot_onnx.errors import ConfigError
from quarot_onnx.graph.metadata import refuse_prefixed
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.progress import Progress
from quarot_onnx.quantization.select import Selection
from quarot_onnx.rotation.apply import apply_plan
from quarot_onnx.rotation.edits import Plan
from quarot_onnx.smoothing.places import find_places
from quarot_onnx.smoothing.plan import plan_smoothing


def smooth_in_place(
    file: str | Path,
    selection: Selection,
    config: SmoothQuantConfig,
    reader: DataReader,
    max_samples: int | None = None,
    *,
    progress: Progress | None = None,
    memory: Memory = WHOLE,
) -> Plan:
    """Measure the model and edit its graph, after which the selection is out of date; weights follow on writing.

    Args:
        file: The float model's file.
        selection: What will be quantized of it; the same model, loaded.
        config: How strongly.
        reader: Calibration data; rewound where it can be.
        max_samples: Stop after so many samples.
        progress: Called after every sample.
        memory: Whether the model is run piece by piece.

    Raises:
        ConfigError: Nothing in the model can take a scale.
        CalibrationError: The reader is empty, or does not fit.
    """
    survey = selection.survey
    refuse_prefixed(survey.model, "smoothed")
    places, refused = find_places(survey.rotatable(), selection)
    if not places:
        why = f"{refused[0].linear}: {refused[0].reason}" if refused else "no input of a Linear is quantized"
        raise ConfigError(f"{config.name}: there is nothing to smooth ({why}); leave out SmoothQuantConfig")
    data = wrap(reader)
    names = [linear.input.name or "" for place in places for linear in place.readers]
    peaks = collect_peaks(file, names, data, max_samples=max_samples, progress=progress, memory=memory)
    data.rewind()
    plan = plan_smoothing(places, refused, peaks, config)
    apply_plan(survey.model, plan, survey.shapes)
    return plan
