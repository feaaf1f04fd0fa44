"""Text that a model writes itself, to calibrate it on: beside text of what it will meet, or where none is at hand.

The first token is any, each further one is drawn as likely as the model finds it (temperature 1): LLM-QAT (Liu et al.
2023, arXiv:2305.17888, section 2.1), and for calibration "Self-calibration for Language Model Quantization and Pruning"
(Williams et al. 2024, arXiv:2410.17170). A window is made of stretches that are written apart from each other, many of
them at once: a step costs little more for many, and their caches stay short.
"""

from collections.abc import Iterator
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from quarot_onnx.calibration.bos import Bos, choose_bos
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.leading import Lead
from quarot_onnx.calibration.text import TokenIds
from quarot_onnx.calibration.tokenizer import load_tokenizer, tokenizer_file
from quarot_onnx.errors import CalibrationError
from quarot_onnx.evaluation.decoder import Decoder
from quarot_onnx.evaluation.scored import Scored
from quarot_onnx.piecewise.memory import WHOLE, opened_bytes
from quarot_onnx.progress import Progress

_STRETCH = 64
"""Tokens that are written together, at most."""

_BLOCK = 256
"""Tokens whose chances are summed up first: a sum over all, one after the other, would take as long as the model."""

_CACHES, _OF_WEIGHTS = 1 << 28, 4
"""Bytes of the caches of all that is written at once; or a quarter of what the weights take, if that is more."""


def why_not(model: ir.Model, folder: Path, inputs: ModelInputs) -> str:
    """Why a model cannot write text to be calibrated on; empty where it can.

    Args:
        model: The model.
        folder: Where it lies.
        inputs: Its inputs.
    """
    if not inputs.takes_ids:
        return "it takes embeddings in place of token ids"
    if not inputs.has_cache:
        return "it has no cache, so that every token would be a run of the whole text"
    if inputs.lengths.seq is not None or inputs.lengths.past is not None:
        return "its lengths are fixed"
    if Lead.of(model, folder) is not None:
        return "it brings a prefix"
    if inputs.no_logits:
        return f"it has no logits: {inputs.no_logits}"
    return "" if inputs.vocab_size is not None else "nothing tells how many tokens it knows"


def own_windows(
    path: str | Path,
    windows: int,
    length: int = 512,
    *,
    tokenizer: str | Path | None = None,
    bos: int | Bos = Bos.AUTO,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> TokenIds:
    """Windows of text that a model writes.

    Args:
        path: The ONNX file.
        windows: How many.
        length: Tokens of a window, BOS among them.
        tokenizer: A tokenizer.json or the folder that holds one; None for the model's folder.
        bos: The BOS id in front of every window, or where it comes from.
        seed: Of what is drawn. Texts of one seed are the same on one kind of processor.
        threads: onnxruntime's intra-op threads.
        progress: Called with the tokens written and their number.

    Returns:
        ``[windows, length]``.

    Raises:
        CalibrationError: No tokenizer, none of its tokens is of a text, lengths that leave no room for text, or a model
            that cannot write.
        ModelError: The model cannot be run, or is none that text can be generated with.
    """
    source = tokenizer_file(Path(path).parent if tokenizer is None else tokenizer)
    first = choose_bos(source, bos).id
    taken = length - (first is not None)
    if windows < 1 or taken < 1:
        raise CalibrationError(f"{windows} windows of {length} tokens hold no text: ask for more")
    decoder = Decoder(path, threads=threads, memory=WHOLE)
    inputs = decoder.model.inputs
    if reason := why_not(decoder.model.model, Path(path).parent, inputs):
        raise CalibrationError(f"{path} cannot write text to be calibrated on, as {reason}: give text")
    allowed = _ordinary(source, inputs)
    ends = [round(i) for i in np.linspace(0, taken, -(-taken // _STRETCH) + 1)]
    stretches = [stop - start for start, stop in pairwise(ends)]
    rng, found = np.random.default_rng(seed), list[TokenIds]()
    longest, count = max(stretches), windows * len(stretches)
    rows = inputs.lengths.batch or _rows(decoder.model, longest)
    for start in range(0, count, rows):
        some = min(rows, count - start)
        written = []
        for token in _written(decoder, (some, longest), first, allowed, rng):
            written.append(token)
            if progress is not None:
                progress(start * longest + len(written) * some, count * longest)
        found.append(np.stack(written, axis=1))
    # Stretches differ by a token at most; what one has too many of is left out.
    parts = np.concatenate(found).reshape(windows, len(stretches), longest)
    texts = [parts[:, number, :kept] for number, kept in enumerate(stretches)]
    front = [] if first is None else [np.full((windows, 1), first, np.int64)]
    return np.concatenate([*front, *texts], axis=1)


def _written(
    decoder: Decoder, shape: tuple[int, int], bos: int | None, allowed: TokenIds, rng: np.random.Generator
) -> Iterator[TokenIds]:
    """The tokens of texts, so many of such a length, one of each at a time: ``[rows]``."""
    rows, length = shape
    decoder.start()
    tokens: TokenIds = rng.choice(allowed, rows)
    following = tokens[:, None] if bos is None else np.stack([np.full(rows, bos, np.int64), tokens], axis=1)
    for _ in range(length - 1):
        yield tokens
        logits = decoder.feed_rows(following)
        allowed = allowed[allowed < logits.shape[1]]
        tokens = allowed[_drawn(logits[:, allowed], rng)]
        following = tokens[:, None]
    yield tokens


def _drawn(logits: npt.NDArray[np.floating], rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """A column of each row, as likely as its logits ``[rows, columns]`` say."""
    wide = logits.astype(np.float32)
    np.exp(np.subtract(wide, wide.max(axis=1, keepdims=True), out=wide), out=wide)
    starts = np.arange(0, wide.shape[1], _BLOCK)
    blocks = np.add.reduceat(wide, starts, axis=1).astype(np.float64)
    found = np.empty(len(wide), np.intp)
    for row, point in enumerate(rng.random(len(wide)) * blocks.sum(axis=1)):
        block, left = _reached(blocks[row], point)
        place, _ = _reached(wide[row, starts[block] : starts[block] + _BLOCK].astype(np.float64), left)
        found[row] = starts[block] + place
    return found


def _reached(weights: npt.NDArray[np.float64], point: float) -> tuple[int, float]:
    """The place where the sum of weights passes a point, and how far into it that is; the last one for rounding."""
    sums = np.cumsum(weights)
    place = min(int(np.searchsorted(sums, point, side="right")), len(sums) - 1)
    return place, point - float(sums[place] - weights[place])


def _ordinary(source: Path, inputs: ModelInputs) -> TokenIds:
    """The ids that text is made of: those of the tokenizer but for special ones."""
    tokenizer = load_tokenizer(source)
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ids = sorted(set(tokenizer.get_vocab(with_added_tokens=True).values()) - special)
    found = [number for number in ids if number < inputs.id_range]
    if not found:
        raise CalibrationError(f"{source} has no token that text is made of, all are special: give text")
    return np.array(found, np.int64)


def _rows(model: Scored, length: int) -> int:
    """How many texts of a length are written at once."""
    feeds = model.inputs.feed(np.zeros((1, 1), np.int64))
    pasts = [feeds[past] for past, _ in model.inputs.presents]  # one row, of no positions
    row = length * sum(prod(size or 1 for size in array.shape) * array.itemsize for array in pasts)
    return max(1, max(_CACHES, opened_bytes(model.model) // _OF_WEIGHTS) // row)
