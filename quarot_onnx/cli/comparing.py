"""The ``compare`` command: a quantized model beside its float original."""

import math
from pathlib import Path

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.leading import Lead
from quarot_onnx.cli.bounding import tell_of_limit
from quarot_onnx.cli.console import notes
from quarot_onnx.errors import ConfigError
from quarot_onnx.evaluation.check import Check, material_for
from quarot_onnx.evaluation.fidelity import Fidelity, Limits, measure, reference
from quarot_onnx.evaluation.sides import require_one_vocabulary
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.run.provenance import is_quantized


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
        InputError: A model cannot be run, text and tokenizer do not fit, or the two have different vocabularies.
        VerificationError: The quantized model's logits are not finite.
    """
    float_model, model = model_io.load(original), model_io.load(quantized)
    tell_of_limit(memory, (float_model, model))
    if is_quantized(float_model):
        if not is_quantized(model):
            raise ConfigError(
                f"FLOAT {original} is quantized and QUANTIZED {quantized} is not: name the float model first"
            )
        notes([f"{original} is quantized itself: the figures tell how far the two are apart"])
    lead = Lead.of(model, quantized.parent)
    held = 0 if lead is None else len(lead.ids)
    inputs = ModelInputs.from_model(model, folder=quantized.parent)
    material = material_for(check, original.absolute(), float_model, held=held, other=(inputs, lead))
    if inputs.vocab_size is not None and material.inputs.vocab_size is not None:
        require_one_vocabulary((original, material.inputs.vocab_size), (quantized, inputs.vocab_size))
    with reference(original, material, threads, memory=memory) as logits:
        return measure(logits, quantized, model=model, limits=check.limits, threads=threads, lead=lead, memory=memory)
