"""The ``quantize`` command: what was chosen, put into one call of the pipeline."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from quarot_onnx import model_io
from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.cli import options as opt
from quarot_onnx.cli.choosing import CALIBRATION, Question, choose
from quarot_onnx.cli.quantize_options import QuantizeOptions
from quarot_onnx.cli.typed import typed_keys
from quarot_onnx.errors import ConfigError
from quarot_onnx.evaluation.check import Check
from quarot_onnx.evaluation.fidelity import Limits
from quarot_onnx.pipeline import Outcome, Progress, quantize
from quarot_onnx.provenance import is_rotated, recorded, summary
from quarot_onnx.quantization import static_ranges
from quarot_onnx.quantization.config import QConfig
from quarot_onnx.quantization.select import select
from quarot_onnx.recipes.own import Calibration

_DEFAULT_TEXT = (
    "calibrated on Python's own documentation, the default; text like what the model will meet (--calib-text) brings "
    "low bits closer to the float model"
)


def run(options: QuantizeOptions, source: Path, progress: Progress) -> Outcome:
    """Quantize.

    Args:
        options: What was typed.
        source: The model's file.
        progress: Called as the work goes on.

    Raises:
        QuarotError: See ``pipeline.quantize``; ConfigError also for options that contradict each other.
    """
    model = model_io.load(source)
    target = opt.target_file(options.out, source)
    model_io.check_target(model, target)
    record = recorded(model)
    typed = typed_keys(options)
    chosen = choose(Question(options, typed, model, record, target))
    calibrated = _needs_text(model, chosen.config)
    reader = _reader(chosen.calibration, source) if calibrated else None
    check = check_asked(options, chosen.calibration)
    outcome = quantize(source, target, chosen.config, reader, verify=options.verify, check=check, progress=progress)
    notes = [*outcome.notes]
    if record is not None and is_rotated(record):
        notes.append(f"the model is already rotated ({summary(record)}): quantized as it is")
    unused = [item.flag for key, item in typed.items() if key.startswith(CALIBRATION)]
    if check is not None:  # which reads text, too
        unused = [flag for flag in unused if flag != "--tokenizer"]
    if not calibrated and unused:
        *others, last = unused
        words = f"{', '.join(others)} and {last}" if others else last
        notes.append(f"nothing is calibrated: {words} not used")
    rounding = chosen.config.rounding
    if rounding is not None and rounding.needs_statistics and chosen.calibration.text is None:
        notes.append(_DEFAULT_TEXT)
    more = chosen.calibration_notes if calibrated else ()
    return replace(outcome, notes=(*notes, *chosen.notes, *more))


def check_asked(options: QuantizeOptions, calibration: Calibration) -> Check | None:
    """The check that the options ask for; None for none.

    Raises:
        ConfigError: Options of the check beside --no-check.
    """
    limits = Limits(options.max_kl, options.max_ppl_ratio)
    if not options.check:
        for name in ("check_tokens", "check_text", "max_kl", "max_ppl_ratio"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} contradicts --no-check; leave out one of them")
        return None
    default = Check(text=options.check_text, tokenizer=calibration.tokenizer, limits=limits)
    return default if options.check_tokens is None else replace(default, tokens=options.check_tokens)


def _needs_text(model: ir.Model, config: QConfig) -> bool:
    """Whether ranges, or a rounding's statistics, are taken on text."""
    rounding = config.rounding
    # Looked at first: it tells of wrong names.
    calibrates = static_ranges.needs_calibration(select(model, config))
    return calibrates or (rounding is not None and rounding.needs_statistics)


def _reader(calibration: Calibration, source: Path) -> TextReader:
    """A reader of text."""
    tokenizer = opt.tokenizer_path(calibration.tokenizer, source)
    return TextReader(source, calibration.text, tokenizer, samples=calibration.samples, seq_len=calibration.seq_len)
