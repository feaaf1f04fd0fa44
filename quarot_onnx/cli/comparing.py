"""The ``compare`` command: a quantized model beside its float original."""

from pathlib import Path

from quarot_onnx.calibration.leading import Lead
from quarot_onnx.cli.bounding import tell_of_limit
from quarot_onnx.evaluation.check import Check, material_for
from quarot_onnx.evaluation.fidelity import Fidelity, measure, reference
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import Memory


def run(original: Path, quantized: Path, check: Check, threads: int | None, memory: Memory) -> Fidelity:
    """Compare; whether a limit is broken is for the caller to ask.

    Args:
        original: The float model's file.
        quantized: The quantized model's.
        check: On what, and what may be lost.
        threads: onnxruntime's threads.
        memory: How the models are run.

    Raises:
        InputError: A model cannot be run, or text and tokenizer do not fit.
        VerificationError: The quantized model's logits are not finite, or of another shape.
    """
    tell_of_limit(memory, original, quantized)
    model = model_io.load(quantized)
    lead = Lead.of(model, quantized.parent)
    held = 0 if lead is None else len(lead.ids)
    material = material_for(check, original.absolute(), model_io.load(original), None, held)
    with reference(original, material, threads, memory=memory) as logits:
        return measure(logits, quantized, model=model, limits=check.limits, threads=threads, lead=lead, memory=memory)
