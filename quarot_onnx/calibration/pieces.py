"""How a window of tokens is run: whole, with tokens decoded at its end, or in pieces that a graph fixes."""

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.errors import CalibrationError, FeedError

_LENGTH, _RUNS = 512, 64
"""Tokens of a window where nobody says; runs of a window that is run in pieces."""


def require_ids(inputs: ModelInputs) -> None:
    """Refuse a graph that a text cannot be fed to.

    Raises:
        FeedError: It takes embeddings in place of token ids.
    """
    if not inputs.takes_ids:
        raise FeedError(f"{inputs.tokens!r} takes embeddings in place of token ids, which a text does not give")


def default_window(inputs: ModelInputs) -> int:
    """Tokens of a window where nobody says how many."""
    fixed = inputs.lengths.seq
    return fitting_window(inputs, _LENGTH if fixed is None else min(_LENGTH, _RUNS * fixed))[0]


def fitting_window(inputs: ModelInputs, seq_len: int, decode_steps: int = 0) -> tuple[int, int]:
    """The nearest window that a graph takes.

    Args:
        inputs: The graph's inputs.
        seq_len: Tokens of a prefill.
        decode_steps: Tokens after it, one by one.

    Returns:
        All its tokens, and how many of them are decoded: those that follow the first run.
    """
    fixed, room, in_place = inputs.lengths.seq, inputs.lengths.past, inputs.lengths.in_place
    steps = decode_steps if inputs.has_cache else 0
    if fixed is None:
        longest = room - steps if room and in_place else seq_len
        return min(seq_len, max(longest, 1)) + steps, steps
    if not inputs.has_cache:
        return fixed, 0
    runs = max(-(-(seq_len + decode_steps) // fixed), 2)
    if room:
        # Past the room the oldest columns are dropped, and the positions may have no more entries in their tables.
        runs = min(runs, max(room // fixed, 1) + (not in_place))
    return runs * fixed, (runs - 1) * fixed


def longest_window(inputs: ModelInputs, positions: int) -> int:
    """The tokens of the longest window that a graph of so many positions takes; more where it fixes more."""
    fixed = inputs.lengths.seq
    longest = min(fitting_window(inputs, positions)[0], positions)
    return longest if fixed is None else max(longest // fixed, 1) * fixed


def pieces(inputs: ModelInputs, length: int, decode_steps: int = 0) -> list[tuple[int, int]]:
    """Start and stop of each run that a window takes.

    Args:
        inputs: The graph's inputs.
        length: Tokens of the window.
        decode_steps: How many of them, at the end, are fed one by one; where the graph fixes a length, that is taken.

    Raises:
        CalibrationError: The graph takes another length.
    """
    fixed = inputs.lengths.seq
    if fixed is None:
        prefill = length - decode_steps
        return [(0, prefill), *((i, i + 1) for i in range(prefill, length))]
    if length % fixed or (length > fixed and not inputs.has_cache):
        raise CalibrationError(
            f"windows have {length} tokens, but {inputs.main.name!r} takes {list(inputs.main.shape or ())}: take "
            f"windows of {fixed}{' or a multiple of it' if inputs.has_cache else ''}"
        )
    return [(i, i + fixed) for i in range(0, length, fixed)]
