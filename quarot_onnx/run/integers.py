"""The last step of a run on the model itself: calibrate, round, and put integers in the place of floats."""

from collections.abc import Mapping
from pathlib import Path

from quarot_onnx.calibration.decoding import decode_steps, find_decoding
from quarot_onnx.calibration.elsewhere import Elsewhere, Shared
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.config import QConfig
from quarot_onnx.emission.apply import StoredWeights, apply_selection
from quarot_onnx.progress import of_phase
from quarot_onnx.quantization import bias_correction, static_ranges
from quarot_onnx.quantization.left_float import left_in_float
from quarot_onnx.quantization.select import Selection
from quarot_onnx.rounding import lowbit
from quarot_onnx.rounding.store import RoundedWeight
from quarot_onnx.run.caching import Cached, quantize_cache
from quarot_onnx.run.preparing import Run, Start


def helped(selection: Selection, config: QConfig) -> bool:
    """Whether workers of a cluster can help: where statistics are taken for rounding, or ranges of activations."""
    rounding = config.rounding
    if rounding is not None and rounding.needs_statistics:
        return True
    return static_ranges.needs_calibration(selection) and static_ranges.can_be_spread(selection)


def put_integers(start: Start, run: Run, target: str | Path) -> tuple[tuple[str, ...], Cached]:
    """Calibrate, round and quantize the model in place; what the user should know, and what came of the cache."""
    selection, work, config = start.selection, run.work, run.config
    calibrated = static_ranges.needs_calibration(selection)
    spread = calibrated and run.cluster is not None and static_ranges.can_be_spread(selection)
    elsewhere, of_decoding = _elsewhere(start, run) if spread else (None, ())
    decoding = None
    if elsewhere is None:
        decoding, of_decoding = find_decoding(start.model, run.folder, work.decode_steps, calibrated=calibrated)
    ranges = static_ranges.calibrate(
        selection,
        start.reader,
        max_samples=start.limit,
        progress=of_phase(run.progress, "calibrate"),
        decoding=decoding,
        memory=run.memory,
        elsewhere=elsewhere,
    )
    if ranges:
        run.clock.lap("calibrate")
    weights: Mapping[str, RoundedWeight] = {}
    notes: tuple[str, ...] = ()
    if work.checkpoint is not None:
        task = lowbit.Task(selection, config, ranges, start.samples, Path(start.file), run.cluster)
        progress = of_phase(run.progress, "round")
        weights, notes = lowbit.round_weights(task, work.checkpoint, work.scratch, progress, run.memory)
    if weights:
        run.clock.lap("round")
    rounded = lowbit.weights_of(config, weights)
    if config.bias_correction:
        assert start.reader is not None, "refused before"
        selection = bias_correction.corrected(
            start.file,
            selection,
            ranges,
            lambda job: rounded(job).load().dequantized(),
            start.reader,
            max_samples=start.limit,
            progress=of_phase(run.progress, "correct"),
            memory=run.memory,
        )
        run.clock.lap("correct")
    stored = StoredWeights(rounded, config.resolved_format, config.accuracy_level)
    notes = (*of_decoding, *left_in_float(start.model.graph, config), *notes)
    cached = quantize_cache(start, run, target)
    apply_selection(selection, ranges, stored, of_phase(run.progress, "quantize"))
    return (*notes, *cached.notes), cached


def _elsewhere(start: Start, run: Run) -> tuple[Elsewhere, tuple[str, ...]]:
    """The workers that take ranges, and what to say of the decode steps that they calibrate on."""
    assert run.cluster is not None
    inputs = None if run.work.decode_steps == 0 else ModelInputs.from_model(start.model, folder=run.folder)
    steps, notes = decode_steps(inputs, run.work.decode_steps)
    shared = Shared(Path(start.file).absolute(), run.folder, steps, run.memory)
    return Elsewhere(run.cluster, shared, run.work.scratch), notes
