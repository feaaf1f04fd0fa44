"""The tokens that a quantized model is checked on: never those that it was calibrated on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.calibration.text import (
    Bos,
    TokenIds,
    default_text,
    load_tokenizer,
    read_text,
    resolve_bos,
    tokenizer_file,
    windows,
)
from quarot_onnx.errors import CalibrationError

WINDOW = 256
"""Tokens of a window, at most."""

DECODE_STEPS = 4
"""Tokens at the end of a window that are decoded one by one."""

_CHARACTERS_PER_TOKEN = 50  # far more than any tokenizer makes of prose
_DOCUMENTATION = "Python's documentation"


@dataclass(frozen=True, eq=False)
class Material:
    """Windows of tokens.

    Attributes:
        inputs: Of the original model.
        ids: ``[windows, tokens]``.
        origin: What they are, for people.
        is_text: Whether they are text, which a perplexity can be taken on.
        decode_steps: Tokens at the end of each window that are decoded one by one.
    """

    inputs: ModelInputs
    ids: TokenIds
    origin: str
    is_text: bool = True
    decode_steps: int = DECODE_STEPS


def random_material(inputs: ModelInputs, tokens: int) -> Material:
    """Random ids, for models without a tokenizer.

    Args:
        inputs: Of the original model.
        tokens: At least so many; rounded up to whole windows.
    """
    count, length = _shape(tokens)
    ids = np.random.default_rng(0).integers(0, inputs.vocab_size or 2, (count, length))
    return Material(inputs, ids, "random ids", is_text=False)


def text_material(
    inputs: ModelInputs,
    tokens: int,
    tokenizer: str | Path,
    *,
    text: str | Path | None = None,
    calibrated: TextReader | None = None,
    bos: int | Bos = Bos.AUTO,
) -> Material:
    """Windows of text.

    Args:
        inputs: Of the original model.
        tokens: At least so many; rounded up to whole windows.
        tokenizer: A tokenizer.json, or the folder that holds one.
        text: A UTF-8 file; None for the part of the calibration text that was not calibrated on or, where there is
            none or too little, the last part of Python's documentation.
        calibrated: The reader that the model was, or will be, calibrated on.
        bos: The BOS id in front of every window; by default what the tokenizer's files say.

    Raises:
        CalibrationError: Text or tokenizer cannot be read, do not fit the model, or hold too little; or the text is
            Python's documentation and all of it was calibrated on.
    """
    count, length = _shape(tokens)
    path = tokenizer_file(tokenizer)
    bos_id = resolve_bos(path, bos)
    needed = count * (length - (bos_id is not None))
    source: str | TokenIds
    if text is not None:
        source, origin = read_text(text), str(text)
    elif calibrated is not None and calibrated.rest.size >= needed:
        source, origin = calibrated.rest, f"{calibrated.text or _DOCUMENTATION}, past what was calibrated on"
    elif calibrated is not None and calibrated.text is None:
        raise CalibrationError(
            f"calibration leaves {calibrated.rest.size} tokens of {_DOCUMENTATION} and the check needs {needed}: "
            "calibrate on fewer samples or on a text of your own (--calib-text), or go without (--no-check)"
        )
    else:
        source, origin = default_text()[-_CHARACTERS_PER_TOKEN * needed :], _DOCUMENTATION
    ids = windows(source, load_tokenizer(path), length=length, count=count, bos_id=bos_id, vocab_size=inputs.vocab_size)
    return Material(inputs, ids, origin)


def _shape(tokens: int) -> tuple[int, int]:
    """Windows and their length."""
    length = max(min(tokens, WINDOW), 2 * DECODE_STEPS)
    return -(-tokens // length), length
