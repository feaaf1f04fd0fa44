"""The ``quantize`` command: what was chosen, put into one call of the pipeline."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from quarot_onnx.calibration.bos import Bos
from quarot_onnx.calibration.readers import SampleReader
from quarot_onnx.calibration.text_files import is_json_lines
from quarot_onnx.cli.calibrating import Asking, needs_text, reader_of
from quarot_onnx.cli.choosing import CALIBRATION, Question, choose
from quarot_onnx.cli.chosen import Chosen
from quarot_onnx.cli.comparing import limits_of
from quarot_onnx.cli.gptaq_options import idle_notes
from quarot_onnx.cli.quantize_options import QuantizeOptions
from quarot_onnx.cli.scheduling import quiet_scheduler
from quarot_onnx.cli.targets import target_file
from quarot_onnx.cli.typed import Typed, typed_keys
from quarot_onnx.config.kernels import widened
from quarot_onnx.errors import ConfigError
from quarot_onnx.evaluation.check import Check
from quarot_onnx.io import model_io
from quarot_onnx.io.lengths import checked_lengths, parse_lengths
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.pipeline import Outcome, quantize
from quarot_onnx.processor import saturates
from quarot_onnx.progress import PhaseProgress
from quarot_onnx.recipes.own import Calibration
from quarot_onnx.run.provenance import is_rotated, recorded, summary
from quarot_onnx.sites.detect import Survey

_OF_CHECK = frozenset({f"{CALIBRATION}tokenizer", f"{CALIBRATION}bos"})
"""What the check of the quantized model reads, too."""

_EXACT_AND_SLOW = (
    "uint8 weights are exact on every processor; on this one, without VNNI, those of 7 bits are faster and nearly as "
    "good when rounded with GPTQ (--w-bits 7 --a-bits 8 --lm-head int8 --weights gptq; docs/processors.md)"
)


def run(options: QuantizeOptions, source: Path, progress: PhaseProgress) -> Outcome:
    """Quantize.

    Args:
        options: What was typed.
        source: The model's file.
        progress: Called as the work goes on.

    Raises:
        QuarotError: See ``pipeline.quantize``; ConfigError also for options that contradict each other.
    """
    unused_notes, memory = idle_notes(options), Memory.of(options.max_memory, options.by_stages)
    model = model_io.load(source)
    target = target_file(options.out, source, overwrite=options.overwrite)
    overwrite = options.overwrite or None
    model_io.check_target(model, target, overwrite=overwrite)
    record = recorded(model)
    typed = typed_keys(options)
    chosen = choose(Question(options, typed, Survey(model), record, target))
    with chosen.in_words():
        calibrated = needs_text(chosen)
    # What is wrong with other options is told before the model writes text.
    check = check_asked(options, chosen.calibration)
    lengths = checked_lengths(model, parse_lengths(options.fix_shape or []))
    asking, start = Asking(source, model, options.feeds, memory, progress), time.perf_counter()
    reader, of_reader = reader_of(chosen, asking) if calibrated else (None, ())
    read = {"texts": time.perf_counter() - start} if calibrated else {}
    with chosen.in_words():
        outcome = quantize(
            source,
            target,
            chosen.config,
            reader,
            selection=chosen.selection,
            verify=options.verify,
            feeds=options.feeds,
            check=check,
            fix_shapes=lengths,
            overwrite=overwrite,
            memory=memory,
            scheduler=quiet_scheduler(options.scheduler),
            progress=progress,
        )
    notes = [*chosen.worded(outcome.notes), *of_reader, *unused_notes]
    if record is not None and is_rotated(record):
        notes.append(f"the model is already rotated ({summary(record)}): quantized as it is")
    of_check = frozenset() if check is None else _OF_CHECK
    unused = [item.flag for key, item in typed.items() if key.startswith(CALIBRATION) and key not in of_check]
    unused += _named_in_file(chosen, typed)
    if not calibrated and unused:
        *others, last = unused
        words = f"{', '.join(others)} and {last}" if others else last
        notes.append(f"nothing is calibrated: {words} not used")
    layer = chosen.config.global_config
    if layer is not None and widened(layer, chosen.config.resolved_format) and saturates():
        notes.append(_EXACT_AND_SLOW)
    if options.feeds is not None and outcome.equivalence is None and not isinstance(reader, SampleReader):
        notes.append("nothing is proved: --feeds not used")
    more = chosen.calibration_notes if calibrated else ()
    return replace(outcome, notes=(*notes, *chosen.notes, *more), seconds={**read, **outcome.seconds})


def _named_in_file(chosen: Chosen, typed: Mapping[str, Typed]) -> list[str]:
    """The texts to be calibrated on that a recipe names, or has the model write; the other keys only say how."""
    named = [f"{CALIBRATION}{name}" for name in ("text", "own") if getattr(chosen.calibration, name)]
    return [] if chosen.wording is None else [chosen.wording.named(key) for key in named if key not in typed]


def check_asked(options: QuantizeOptions, calibration: Calibration) -> Check | None:
    """The check that the options ask for; None for none.

    Raises:
        ConfigError: Options of the check beside --no-check.
    """
    limits = limits_of(options.max_kl, options.max_ppl_ratio)
    if not options.check:
        for name in ("check_tokens", "check_text", "max_kl", "max_ppl_ratio"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} contradicts --no-check; leave out one of them")
        return None
    text = options.check_text
    tokens = {} if options.check_tokens is None else {"tokens": options.check_tokens}
    return Check(
        text=text,
        # A key that was given for the calibration text goes for a text of the same kind.
        text_key=calibration.text_key if text is not None and is_json_lines(text) else None,
        tokenizer=calibration.tokenizer,
        bos=Bos.of(calibration.bos),
        limits=limits,
        **tokens,
    )
