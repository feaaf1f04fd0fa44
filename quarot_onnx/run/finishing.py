"""The end of a run: the files that will be the output, checked as they will be opened."""

from collections.abc import Mapping
from pathlib import Path

from quarot_onnx.io import model_io
from quarot_onnx.io.lengths import fix_lengths
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.run.preparing import Run, Start
from quarot_onnx.sessions import runtime


def complete(run: Run, start: Start, fix_shapes: Mapping[str, int], quantized: Path) -> dict[str, object]:
    """Compare the files that will be the output, written from ``start``, with the original; then fix their lengths."""
    run.clock.lap("quantize")
    run.progress("check", 0, None)
    record = run.checking.run(quantized, start.model, start.lead)
    run.progress("check", 1, 1)
    run.clock.lap("check")
    if fix_shapes:
        fix_lengths(quantized, fix_shapes)
        _require_open(quantized, run.memory)
    return record


def _require_open(file: Path, memory: Memory) -> None:
    """Refuse a file that onnxruntime does not open, as it comes where it fits, or else with its weights left in it."""
    fits = not memory.divides(model_io.load(file))
    runtime.session(file, optimize=fits, low_memory=not fits)
