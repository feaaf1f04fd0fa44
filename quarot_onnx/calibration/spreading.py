"""Windows of token ids from all over a text: few of them see the more of what it is about, the further apart they are.

The text is parted into as many parts of one length as there are windows, and a window is the beginning of each, from
its first line on. Nothing else of a long text is tokenized. Blank stretches, which are no text, count for nothing.
"""

import re
from itertools import chain, pairwise

import numpy as np
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from quarot_onnx.calibration.text import TokenIds, each_window, tokenize
from quarot_onnx.errors import ShortTextError

_LINE = 4096
"""Characters that are looked through for the beginning of a line, and of a word."""

_BLANK = re.compile(r"(?<!\s)\s{257,}")
"""A blank stretch: more than any layout of text has. One may be longer than all text together. What stands before it is
looked at so that no run of blanks is tried from every one of them."""


def spread_windows(
    text: str, tokenizer: Tokenizer, *, length: int, count: int, bos_id: int | None, more: int
) -> tuple[TokenIds, TokenIds]:
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
        from behind each.

    Raises:
        ShortTextError: A part of the text holds fewer tokens than a window takes, or a window takes none.
    """
    found, between = list[TokenIds](), list[TokenIds]()
    taken = length - (bos_id is not None)
    if taken < 1:
        raise ShortTextError(f"windows of {length} tokens hold no text", "ask for longer ones")
    text = _BLANK.sub(_line_end, text)
    share = -(-more // count)
    edges = chain((_beginning(text, len(text) * number // count) for number in range(count)), [len(text)])
    for number, (start, stop) in enumerate(pairwise(edges), start=1):
        part = text[start:stop]
        ids = tokenize(part, tokenizer, length + share) if part.strip() else np.empty(0, np.int64)
        cut = next(each_window(ids, length, bos_id), None)
        if cut is None:
            where = f"part {number} of {count}" if count > 1 else "all of it"
            tokens = f"{ids.size} token{'' if ids.size == 1 else 's'}"
            raise ShortTextError(f"{where} has {tokens}, and a window takes {taken}", "give more text")
        used = length - int(cut[0] != ids[0])  # a BOS was put in front
        found.append(cut)
        between.append(ids[used : used + share])
    return np.stack(found), np.concatenate(between)


def _line_end(blank: re.Match[str]) -> str:
    """What stands for a blank stretch."""
    return "\n\n" if "\n" in blank.group() else " "


def _beginning(text: str, place: int) -> int:
    """Where a line begins behind a place, or a word where lines are long."""
    if not place:
        return 0
    for mark in "\n", " ":
        found = text.find(mark, place - 1, place + _LINE)
        if found >= 0:
            return found + 1
    return place
