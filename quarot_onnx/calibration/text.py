"""Text to windows of token ids.

The text is tokenized as one, without special tokens, and cut into windows that do not overlap; the customary way for
WikiText perplexity. Past what the windows take it is not tokenized. With a BOS id every window is
``[BOS] + length - 1`` tokens of text: models trained with a leading BOS park their attention there, and without it
their activations and perplexity are those of another regime. Where the text of a window begins with the BOS itself,
that one serves.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from quarot_onnx.calibration.bos import Bos, BosChoice, choose_bos, find_bos, resolve_bos
from quarot_onnx.calibration.text_files import read_text
from quarot_onnx.calibration.tokenizer import load_tokenizer, token_ids, tokenizer_file
from quarot_onnx.errors import CalibrationError, ShortTextError

__all__ = [
    "Bos",
    "BosChoice",
    "TokenIds",
    "check_vocabulary",
    "choose_bos",
    "default_text",
    "each_window",
    "find_bos",
    "load_tokenizer",
    "read_text",
    "resolve_bos",
    "tokenize",
    "tokenizer_file",
    "windows",
]

TokenIds = npt.NDArray[np.int64]

_PROBE = 4096  # characters that show how many make a token
_MARGIN = 1.25  # for prose that is not as dense everywhere
_EDGE = 256  # tokens before the end of a piece: what follows in the text may change them


def default_text() -> str:
    """Calibration text that every Python carries: the topics of ``help()``, in the order of their names.

    English prose about a programming language with code in it, some 600 kB, from the standard library's
    ``pydoc_data.topics``. It depends on the Python version; give a text of your own for results that must not.
    """
    from pydoc_data.topics import topics  # noqa: PLC0415 (600 kB, rarely wanted)

    return "\n\n".join(topics[name] for name in sorted(topics))


def tokenize(text: str, tokenizer: Tokenizer, first: int | None = None) -> TokenIds:
    """The token ids of a text, ``[tokens]``, without special tokens.

    Args:
        text: The text.
        tokenizer: The tokenizer.
        first: How many from the start are wanted; there may be more, and are fewer only where the text ends. None for
            all.

    Raises:
        CalibrationError: The text is empty, or holds what is no character.
    """
    size = len(text) if first is None else _PROBE
    while first is not None and size < len(text):
        ids = _encode(text[:size], tokenizer)
        if ids.size >= first + _EDGE:
            return ids[:-_EDGE]
        size = max(2 * size, int(_MARGIN * size * (first + _EDGE) / max(ids.size, 1)))
    ids = _encode(text, tokenizer)
    if not ids.size:
        raise CalibrationError("the text is empty, there are no tokens in it: give some text")
    return ids


def _encode(text: str, tokenizer: Tokenizer) -> TokenIds:
    return np.asarray(token_ids(text, tokenizer), np.int64)


def windows(
    source: str | Sequence[int] | TokenIds,
    tokenizer: Tokenizer | None = None,
    *,
    length: int,
    count: int | None,
    bos_id: int | None = None,
    vocab_size: int | None = None,
) -> TokenIds:
    """Cut a text into windows of token ids that do not overlap.

    Args:
        source: The text, or its token ids.
        tokenizer: The tokenizer, needed for a text.
        length: Tokens of a window, BOS among them.
        count: How many windows; None for as many as the text fills.
        bos_id: Put in front of every window; None for none.
        vocab_size: The model's vocabulary; every id is checked against it.

    Returns:
        ``[count, length]``.

    Raises:
        ShortTextError: Too little text.
        CalibrationError: A text that holds what is no character, an id outside the vocabulary, or a
            length that leaves no room for text.
    """
    taken = length - (bos_id is not None)
    if taken < 1 or (count is not None and count < 1):
        raise CalibrationError(f"{count} windows of {length} tokens hold no text: ask for more")
    if isinstance(source, str):
        if tokenizer is None:
            raise CalibrationError("a text needs a tokenizer: name a tokenizer.json")
        ids = tokenize(source, tokenizer, None if count is None else count * length)
    else:
        ids = np.asarray(source, np.int64)
    most = None if count is None else min(count, ids.size)  # each takes a token at least
    found = list(islice(each_window(ids, length, bos_id), most))
    wanted = len(found) if count is None else count
    if len(found) < max(wanted, 1):
        fewer = f"{len(found)} window{'s' if len(found) > 1 else ''}" if found else "shorter windows"
        needs = f"1 window of {length} needs" if wanted <= 1 else f"{wanted} windows of {length} need"
        there = ids.size if bos_id is None else np.count_nonzero(ids != bos_id)
        raise ShortTextError(
            f"{needs} {max(wanted, 1) * taken} tokens of text, there are {there}",
            f"ask for {fewer}, or give more text" if there > 1 else "give more text",
        )
    cut = np.stack(found)
    check_vocabulary(cut, vocab_size, tokenizer)
    return cut


def each_window(ids: TokenIds, length: int, bos_id: int | None) -> Iterator[TokenIds]:
    """All windows ``[length]`` of token ids, one after the other; a BOS in the text is not put there twice."""
    start = 0
    while True:
        front = [] if bos_id is None or ids[start : start + 1].tolist() == [bos_id] else [bos_id]
        stop = start + length - len(front)
        if stop > ids.size:
            return
        yield np.concatenate([np.array(front, np.int64), ids[start:stop]])
        start = stop


def check_vocabulary(ids: TokenIds, vocab_size: int | None, tokenizer: Tokenizer | None = None) -> None:
    """Check ids against the model's vocabulary.

    Raises:
        CalibrationError: An id is outside of it.
    """
    if vocab_size is None:
        return
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        size = f" (the tokenizer has {tokenizer.get_vocab_size()})" if tokenizer is not None else ""
        raise CalibrationError(
            f"token id {int(wrong[0])} is outside the model's vocabulary of {vocab_size}{size}: "
            "use the tokenizer that belongs to the model, and ids that it has"
        )
