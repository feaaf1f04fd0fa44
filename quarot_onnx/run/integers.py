"""The last step of a run on the model itself: calibrate, round, and put integers in the place of floats."""

from collections.abc import Mapping
from pathlib import Path

from quarot_onnx.calibration.decoding import find_decoding
from quarot_onnx.emission.apply import StoredWeights, apply_selection
from quarot_onnx.progress import of_phase
from quarot_onnx.quantization import bias_correction, static_ranges
from quarot_onnx.quantization.left_float import left_in_float
from quarot_onnx.rounding import lowbit
from quarot_onnx.rounding.store import RoundedWeight
from quarot_onnx.run.caching import Cached, quantize_cache
from quarot_onnx.run.preparing import Run, Start


def put_integers(start: Start, run: Run, target: str | Path) -> tuple[tuple[str, ...], Cached]:
    """Calibrate, round and quantize the model in place; what the user should know, and what came of the cache."""
    selection, work, config = start.selection, run.work, run.config
    calibrated = static_ranges.needs_calibration(selection)
    decoding, of_decoding = find_decoding(
        start.file,
        run.folder,
        start.reader,
        work.decode_steps,
        limit=start.limit,
        calibrated=calibrated,
        memory=run.memory,
    )
    ranges = static_ranges.calibrate(
        start.file,
        selection,
        start.reader,
        max_samples=start.limit,
        progress=of_phase(run.progress, "calibrate"),
        decoding=decoding,
        memory=run.memory,
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
