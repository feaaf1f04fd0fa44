"""``inspect --sinks``: which tokens of a text are outliers, and what a prefix would save."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quarot_onnx.calibration.bos import Bos
from quarot_onnx.calibration.leading import Lead
from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.calibration.tokenizer import load_tokenizer
from quarot_onnx.errors import ConfigError, ShortTextError
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.prefix.sinks import Sinks
from quarot_onnx.progress import PhaseProgress, of_phase

_LONGEST, _WINDOWS, _SHOWN = 4, 16, 6


@dataclass(frozen=True)
class SinkText:
    """The text that outliers are looked for in.

    Attributes:
        tokenizer: A tokenizer.json.
        file: Its file; None for the default one.
        key: Its key in JSON lines.
        bos: What stands before every window.
    """

    tokenizer: Path
    file: Path | None = None
    key: str | None = None
    bos: int | Bos = Bos.AUTO


def find_sinks(path: Path, text: SinkText, progress: PhaseProgress) -> list[dict[str, object]]:
    """The prefixes that were tried, the best of each length.

    Args:
        path: The float model.
        text: The text.
        progress: Called after every prefix.

    Returns:
        For each: ``prefix`` and ``tokens`` (ids and words), ``bits`` that outliers cost on the mean over the Linears'
        inputs, ``worst`` and ``input`` (the largest ratio of a token's peak to the median, and where), ``pieces`` of
        text with an outlier, ``outliers`` (words and how often).

    Raises:
        InputError: The model takes no text or has a prefix already, or text and tokenizer do not fit.
    """
    model = model_io.load(path)
    if (lead := Lead.of(model, path.parent)) is not None:
        raise ConfigError(f"{path} has the prefix {list(lead.ids)} already; look for one in the model without it")
    windows = partial(TextReader, samples=_WINDOWS, bos=text.bos, text_key=text.key, held=_LONGEST, model=model)
    try:
        reader = windows(path, text.file, text.tokenizer)
    except ShortTextError as error:
        raise ShortTextError(error.reason, "give more text (--text)") from error
    words = load_tokenizer(reader.tokenizer_path)
    sinks = Sinks(model, reader.inputs, (), [reader.token_windows], memory=Memory())
    found = sinks.search(_LONGEST, of_phase(progress, "sinks"))

    def word(token: int) -> str:
        return str(words.decode([token], skip_special_tokens=False))

    return [
        {
            "prefix": list(loss.ids),
            "tokens": [word(token) for token in loss.ids],
            "bits": loss.bits,
            "worst": loss.worst[0],
            "input": loss.worst[1],
            "pieces": loss.pieces,
            "outliers": [[word(token), count] for token, count in loss.outliers[:_SHOWN]],
        }
        for loss in found
    ]
