"""The tokens that a quantized model is checked on: never those that it was calibrated on."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.leading import Lead
from quarot_onnx.calibration.pieces import common_window, fitting_window, require_ids, takes
from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.calibration.text import (
    Bos,
    TokenIds,
    choose_bos,
    default_text,
    load_tokenizer,
    read_text,
    tokenizer_file,
    windows,
)
from quarot_onnx.errors import CalibrationError, ShortTextError
from quarot_onnx.evaluation.before import Before

WINDOW = 256
"""Tokens of a window, at most."""

DECODE_STEPS = 4
"""Tokens at the end of a window that are decoded one by one, where the graph fixes no length."""

_CHARACTERS_PER_TOKEN = 50  # far more than any tokenizer makes of prose
_DOCUMENTATION = "Python's documentation"


@dataclass(frozen=True, eq=False)
class Material:
    """Windows of tokens.

    Attributes:
        inputs: Of the original model.
        ids: ``[windows, tokens]``.
        origin: What they are, for people.
        decode_steps: Tokens at the end of each window that are decoded after it.
        is_text: Whether they are text, which a perplexity can be taken on.
        lead: What the original model holds before the tokens that it is fed.
    """

    inputs: ModelInputs
    ids: TokenIds
    origin: str
    decode_steps: int
    is_text: bool = True
    lead: Lead | None = None

    def fed_to(self, inputs: ModelInputs, lead: Lead | None) -> tuple["Material", Before, int]:
        """The windows as a model is fed them.

        Args:
            inputs: Of the model.
            lead: What it holds before them.

        Returns:
            The windows without the tokens at their start that it brings itself; what it is fed before; and how many
            tokens it brings.
        """
        steps = self.decode_steps
        shared = 0 if lead is None else min(lead.shared(row) for row in self.ids)
        held = next((n for n in range(shared, -1, -1) if takes(inputs, self.ids.shape[1] - n, steps)), shared)
        fed = replace(self, ids=self.ids[:, held:], decode_steps=steps if inputs.has_cache else 0)
        return fed, Before(past=lead), held


@dataclass(frozen=True)
class Other:
    """The model that is compared with the original.

    Attributes:
        inputs: Its inputs.
        held: Tokens at the start of a text that it brings itself.
    """

    inputs: ModelInputs
    held: int


@dataclass(frozen=True)
class Shape:
    """How many tokens are looked at, and how.

    Attributes:
        windows: Their number, whole batches of the graph's.
        length: Tokens of a window.
        decode_steps: Tokens at its end that are decoded.
    """

    windows: int
    length: int
    decode_steps: int

    @classmethod
    def of(cls, inputs: ModelInputs, tokens: int, positions: int | None, other: Other | None = None) -> "Shape":
        """Windows that a graph takes, and another one beside it.

        Args:
            inputs: Of the graph.
            tokens: At least so many.
            positions: The model's positions, where they are known.
            other: The other model, where it is known.
        """
        most = min(tokens, WINDOW, positions or WINDOW)
        length, steps = fitting_window(inputs, max(most - DECODE_STEPS, 1), DECODE_STEPS)
        if other is not None:
            length = common_window(
                inputs, other.inputs, length, decode_steps=DECODE_STEPS, held=other.held, most=positions
            )
            if inputs.lengths.seq is not None:
                steps = length - inputs.lengths.seq if inputs.has_cache else 0
        rows = math.lcm(inputs.lengths.batch or 1, 1 if other is None else other.inputs.lengths.batch or 1)
        return cls(-(-tokens // (length * rows)) * rows, length, steps)


def random_material(inputs: ModelInputs, shape: Shape) -> Material:
    """Random ids, for models without a tokenizer."""
    ids = np.random.default_rng(0).integers(0, inputs.vocab_size or 2, (shape.windows, shape.length))
    return Material(inputs, ids, "random ids", shape.decode_steps, is_text=False)


def text_material(
    inputs: ModelInputs,
    shape: Shape,
    tokenizer: str | Path,
    *,
    text: str | Path | None = None,
    text_key: str | None = None,
    calibrated: TextReader | None = None,
    bos: int | Bos = Bos.AUTO,
) -> Material:
    """Windows of text.

    Args:
        inputs: Of the original model.
        shape: Of the windows.
        tokenizer: A tokenizer.json, or the folder that holds one.
        text: A UTF-8 file; None for the part of the calibration text that was not calibrated on or, where there is
            none or too little, the last part of Python's documentation.
        text_key: The key of the text in JSON lines; see ``read_text``.
        calibrated: The reader that the model was, or will be, calibrated on.
        bos: The BOS id in front of every window, or where it comes from; by default what the tokenizer's files say.

    Raises:
        CalibrationError: Text or tokenizer cannot be read, do not fit the model, or hold too little; or the text is
            Python's documentation and all of it was calibrated on.
        FeedError: The graph takes no token ids.
    """
    require_ids(inputs)
    path = tokenizer_file(tokenizer)
    bos_id = choose_bos(path, bos).id
    needed = shape.windows * (shape.length - (bos_id is not None))
    source: str | TokenIds
    if text is not None:
        source, origin = read_text(text, text_key), str(text)
    elif calibrated is not None and calibrated.rest.size >= needed:
        past = ", parts that were not calibrated on" if calibrated.of_text else ""
        source, origin = calibrated.rest, f"{calibrated.text or _DOCUMENTATION}{past}"
    elif calibrated is not None and calibrated.text is None:
        raise CalibrationError(
            f"calibration leaves {calibrated.rest.size} tokens of {_DOCUMENTATION} and the check needs {needed}: "
            "calibrate on fewer samples or on a text of your own (--calib-text), or go without (--no-check)"
        )
    else:
        source, origin = default_text()[-_CHARACTERS_PER_TOKEN * needed :], _DOCUMENTATION
    try:
        ids = windows(
            source,
            load_tokenizer(path),
            length=shape.length,
            count=shape.windows,
            bos_id=bos_id,
            vocab_size=inputs.vocab_size,
        )
    except ShortTextError as error:  # what is asked for is a number of tokens
        raise ShortTextError(error.reason, "compare on fewer tokens, or give more text") from error
    return Material(inputs, ids, origin, shape.decode_steps)
