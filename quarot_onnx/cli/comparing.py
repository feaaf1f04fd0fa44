"""The ``compare`` command: a quantized model beside its float original."""

import math
from pathlib import Path

from quarot_onnx.calibration.leading import Lead
from quarot_onnx.cli.bounding import tell_of_limit
from quarot_onnx.errors import ConfigError
from quarot_onnx.evaluation.check import Check, material_for
from quarot_onnx.evaluation.fidelity import Fidelity, Limits, measure, reference
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import Memory


def limits_of(max_kl: float | None, max_ppl_ratio: float | None) -> Limits:
    """What may be lost, as it was typed.

    Raises:
        ConfigError: Infinity, which limits nothing.
    """
    for option, value in (("--max-kl", max_kl), ("--max-ppl-ratio", max_ppl_ratio)):
        if value is not None and math.isinf(value):
            raise ConfigError(f"{option} {value} is no limit: give a finite number, or leave it out")
    return Limits(max_kl=max_kl, max_ppl_ratio=max_ppl_ratio)


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
