"""Windows of token ids from all over a text: few of them see the more of what it is about, the further apart they are.

The text is parted into as many parts of one length as there are windows, and a window is the beginning of each, from
its first line on. Nothing else of a long text is tokenized.
"""

from itertools import pairwise

import numpy as np
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from quarot_onnx.calibration.text import TokenIds, each_window, tokenize

_LINE = 4096
"""Characters that are looked through for the beginning of a line, and of a word."""


def spread_windows(
    text: str, tokenizer: Tokenizer, *, length: int, count: int, bos_id: int | None, more: int
) -> tuple[TokenIds, TokenIds] | None:
    """Windows from all over a text.

    Args:
        text: The text.
        tokenizer: The tokenizer.
        length: Tokens of a window, BOS among them.
        count: How many windows, 1 or more.
        bos_id: Put in front of every window that does not begin with it; None for none.
        more: How many tokens from behind the windows are wanted beside them.

    Returns:
        ``[count, length]``, and the tokens between the windows, ``[tokens]``: at most about ``more``, in equal shares
        from behind each; None where a part of the text is shorter than a window, or a window holds no text.
    """
    found, between = list[TokenIds](), list[TokenIds]()
    if length <= (bos_id is not None):
        return None
    share = -(-more // count)
    edges = [*(_beginning(text, len(text) * number // count) for number in range(count)), len(text)]
    for start, stop in pairwise(edges):
        part = text[start:stop]
        if not part.strip():
            return None
        ids = tokenize(part, tokenizer, length + share)
        cut = next(each_window(ids, length, bos_id), None)
        if cut is None:
            return None
        used = length - int(cut[0] != ids[0])  # a BOS was put in front
        found.append(cut)
        between.append(ids[used : used + share])
    return np.stack(found), np.concatenate(between)


def _beginning(text: str, place: int) -> int:
    """Where a line begins behind a place, or a word where lines are long."""
    if not place:
        return 0
    for mark in "\n", " ":
        found = text.find(mark, place - 1, place + _LINE)
        if found >= 0:
            return found + 1
    return place
