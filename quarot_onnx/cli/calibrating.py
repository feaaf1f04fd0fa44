"""What ``quantize`` calibrates on: a text, Python's documentation, what the model writes itself, or feeds."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from quarot_onnx.calibration.bos import Bos
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.given import given_feeds
from quarot_onnx.calibration.pieces import require_ids
from quarot_onnx.calibration.readers import DataReader, SampleReader, TextReader
from quarot_onnx.cli import options as opt
from quarot_onnx.cli.chosen import Chosen
from quarot_onnx.errors import ConfigError, FeedError, QuarotError
from quarot_onnx.generation.own_text import own_windows, why_not
from quarot_onnx.kvcache.plan import needs_calibration
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.progress import PhaseProgress, of_phase
from quarot_onnx.quantization import static_ranges
from quarot_onnx.recipes.own import Calibration
from quarot_onnx.run.prefixing import held_positions

_NAME_TEXT = (
    "name text like what the model will meet (--calib-text): at 4-bit weights and 8-bit activations SmolLM2's "
    "perplexity on WikiText-2 was {} x the float model's so, 1.10 x where other parts of it were named"
)
_OWN = f"calibrated on text that the model wrote; {_NAME_TEXT.format('1.14')}"
_BOTH = "calibrated on {} windows of {} and {} that the model wrote (--calib-own 0 leaves them out)"
_ALONE = "calibrated on {} alone{}"
_DOCUMENTATION = f"calibrated on Python's own documentation{{}}; {_NAME_TEXT.format('1.20')}"

_BESIDE = 16
"""Windows that the model writes beside a text that is named, at most: where few are asked for, as many."""

_COPIES = 2
"""How often the weights of a model are in memory that writes: as they lie in the file, and packed."""


@dataclass(frozen=True, eq=False)
class Asking:
    """What a reader is made for.

    Attributes:
        source: The model's file.
        model: What was loaded of it.
        feeds: Where the user's own feeds lie; None for none.
        memory: What the run may take.
        progress: Called as the work goes on.
        held: Positions that a prefix may take.
    """

    source: Path
    model: ir.Model
    feeds: Path | None
    memory: Memory
    progress: PhaseProgress
    held: int = 0


def needs_text(chosen: Chosen) -> bool:
    """Whether ranges, or an algorithm's statistics, are taken on text."""
    selection, config = chosen.selection, chosen.config
    of_cache = needs_calibration(selection.survey, config)
    return static_ranges.needs_calibration(selection) or config.needs_samples or of_cache


def reader_of(chosen: Chosen, asking: Asking) -> tuple[DataReader, tuple[str, ...]]:
    """A reader of text, or of the feeds that were given where a text cannot be fed, and what to say of it.

    Raises:
        QuarotError: The text, the tokenizer, the feeds or the model cannot be read or do not fit each other, or the
            model is to write text and cannot.
    """
    calibration = chosen.calibration
    try:
        inputs = ModelInputs.from_model(asking.model, folder=asking.source.parent)
        require_ids(inputs)  # before a tokenizer is asked for
    except FeedError as error:
        if asking.feeds is None:
            way = "give calibration samples (--feeds FILE.npz; in Python, a CalibrationDataReader)"
            raise FeedError(error.reason, way) from error
        unused = f"; {calibration.text} is not read" if calibration.text is not None else ""
        unused += "; --calib-own not used" if calibration.own else ""
        note = f"calibrated on {asking.feeds}, as no text can be fed: {error.reason}{unused}"
        return SampleReader(given_feeds(asking.feeds, asking.model)), (note,)
    rounding = chosen.config.rounding
    rounded = rounding is not None and rounding.needs_statistics
    asking = replace(asking, held=held_positions(chosen.config, asking.model))
    return _text_reader(calibration, asking, inputs, rounded=rounded)


def _text_reader(
    calibration: Calibration, asking: Asking, inputs: ModelInputs, *, rounded: bool
) -> tuple[TextReader, tuple[str, ...]]:
    """A reader of a text, of what the model writes, or of both, as is asked for or usual, and what to say of it."""
    text, asked, samples = calibration.text, calibration.own, calibration.samples
    own = asked or 0
    if asked is None and rounded:
        own = samples if text is None else min(_BESIDE, samples)
    reason = _why_not(asking, inputs) if own else ""
    if reason and asked:
        raise ConfigError(
            f"{asking.source} cannot write text to be calibrated on, as {reason}: leave out --calib-own "
            "(calibration.own in a recipe), and name text if none is"
        )
    if own and not reason:
        # Where weights are rounded it stands for the documentation, unless numbers of both are typed.
        typed = bool(asked) and "samples" in calibration.model_fields_set
        of_text = 0 if text is None and rounded and not typed else samples
        try:
            reader = _with_own(calibration, asking, inputs, of_text, own)
        except QuarotError as error:
            if asked:
                raise
            reason = str(error)  # what is the user's mistake will come up again with text alone
        else:
            written = len(reader.token_windows) - reader.of_text
            said = _OWN if text is None else _BOTH.format(reader.of_text, text, written)
            return reader, () if asked else (said,)
    reader = _with_own(calibration, asking, inputs, samples, 0)
    why = f" (the model writes none itself: {reason})" if reason else ""
    if text is not None:
        return reader, (_ALONE.format(text, why),) if reason else ()
    return reader, (_DOCUMENTATION.format(why),) if rounded else ()


def _why_not(asking: Asking, inputs: ModelInputs) -> str:
    """Why the model writes no text here; empty where it can."""
    reason = why_not(asking.model, asking.source.parent, inputs)
    if not reason and not asking.memory.holds(asking.model, _COPIES):
        return "it does not fit into memory, and every token would be a pass over the file"
    return reason


def _with_own(calibration: Calibration, asking: Asking, inputs: ModelInputs, samples: int, own: int) -> TextReader:
    """A reader of so many windows of text, and of so many that the model writes, in whole batches."""
    tokenizer, bos = opt.tokenizer_path(calibration.tokenizer, asking.source), Bos.of(calibration.bos)
    rows = inputs.lengths.batch or 1
    count, progress = -(-own // rows) * rows, of_phase(asking.progress, "own text")
    write = partial(own_windows, asking.source, count, tokenizer=tokenizer, bos=bos, progress=progress)
    return TextReader(
        asking.source,
        calibration.text,
        tokenizer,
        samples=samples,
        seq_len=calibration.seq_len if "seq_len" in calibration.model_fields_set else None,
        more=write if own else None,
        bos=bos,
        text_key=calibration.text_key,
        decode_steps=calibration.decode_steps,
        spread=calibration.spread,
        held=asking.held,
        model=asking.model,
        memory=asking.memory,
        progress=of_phase(asking.progress, "caches"),
    )
