"""How a window of tokens is run: whole, with tokens decoded at its end, or in pieces that a graph fixes."""

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.errors import CalibrationError, FeedError

USUAL_WINDOW = 512
"""Tokens of a window where nobody says how many."""

_RUNS = 64
"""Runs of a window that is run in pieces."""


def require_ids(inputs: ModelInputs) -> None:
    """Refuse a graph that a text cannot be fed to.

    Raises:
        FeedError: It takes embeddings in place of token ids.
    """
    if not inputs.takes_ids:
        raise FeedError(f"{inputs.tokens!r} takes embeddings in place of token ids, which a text does not give")


def default_window(inputs: ModelInputs, positions: int | None = None) -> int:
    """Tokens of a window where nobody says how many.

    Args:
        inputs: The graph's inputs.
        positions: What the window had better not exceed; None where that is not known.
    """
    fixed = inputs.lengths.seq
    length = fitting_window(inputs, USUAL_WINDOW if fixed is None else min(USUAL_WINDOW, _RUNS * fixed))[0]
    return length if positions is None or length <= positions else longest_window(inputs, positions)


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


def takes(inputs: ModelInputs, length: int, decode_steps: int = 0) -> bool:
    """Whether a graph takes a window, and has all that stands before a token in its cache.

    Args:
        inputs: The graph's inputs.
        length: Tokens of the window.
        decode_steps: As for ``pieces``.
    """
    fixed, room, in_place = inputs.lengths.seq, inputs.lengths.past, inputs.lengths.in_place
    if fixed is not None and (length % fixed or (length > fixed and not inputs.has_cache)):
        return False
    if not room or not inputs.has_cache:
        return length > 0
    if in_place:
        return length <= room
    last = (1 if decode_steps else length) if fixed is None else fixed
    return 0 < length <= room + last


def common_window(
    a: ModelInputs, b: ModelInputs, length: int, *, decode_steps: int, held: int, most: int | None
) -> int:
    """The nearest window that two graphs take.

    Args:
        a: The inputs of one.
        b: Those of the other.
        length: A window that the first takes.
        decode_steps: Tokens at its end that are fed one by one; where a graph fixes a length, that is taken.
        held: Tokens at its start that the other one brings itself.
        most: Tokens that a window had better not exceed, if any.

    Returns:
        Its tokens: at most ``length``, or enough for two runs where that is more; else the next longer one that both
        take. Where they have none in common, ``length``.
    """
    steps = [decode_steps if inputs.has_cache else 0 for inputs in (a, b)]
    fed = fitting_window(b, max(length - held - steps[1], 1), steps[1])[0]
    wanted = max(length, min(fed + held, most or fed + held))
    longer = max(wanted, fed + held) + (a.lengths.seq or 1) * (b.lengths.seq or 1)
    tried = (*range(wanted, held, -1), *range(wanted + 1, longer + 1))
    return next((n for n in tried if takes(a, n, steps[0]) and takes(b, n - held, steps[1])), length)


def room_note(inputs: ModelInputs, length: int, *, decode_steps: int = 0, held: int = 0) -> tuple[str, ...]:
    """What to say of windows that a graph takes, but for which its cache is too short.

    Args:
        inputs: The graph's inputs.
        length: Tokens of a window that are fed.
        decode_steps: As for ``pieces``.
        held: As there.
    """
    if takes(inputs, length, decode_steps):
        return ()
    longest = next((n for n in range(length - 1, 0, -1) if takes(inputs, n, decode_steps)), None)
    way_out = "" if longest is None else f": use {longest + held} or fewer (--seq-len)"
    note = (
        f"windows of {length + held} tokens are longer than what the graph's cache of {inputs.lengths.past} positions "
        f"holds, and what is older is not seen{way_out}"
    )
    return (note,)


def pieces(inputs: ModelInputs, length: int, decode_steps: int = 0, held: int = 0) -> list[tuple[int, int]]:
    """Start and stop of each run that a window takes.

    Args:
        inputs: The graph's inputs.
        length: Tokens of the window.
        decode_steps: How many of them, at the end, are fed one by one; where the graph fixes a length, that is taken.
        held: Tokens before them that are not fed, as the model brings them itself.

    Raises:
        CalibrationError: The graph takes another length.
    """
    fixed = inputs.lengths.seq
    if fixed is None:
        prefill = length - decode_steps
        return [(0, prefill), *((i, i + 1) for i in range(prefill, length))]
    if length % fixed or (length > fixed and not inputs.has_cache):
        own = f", of which the model brings {held} itself" if held else ""
        multiple = f" or {fixed} more, and so on" if held else " or a multiple of it"
        raise CalibrationError(
            f"windows have {length + held} tokens{own}, but {inputs.main.name!r} takes "
            f"{list(inputs.main.shape or ())}: take windows of {fixed + held}{multiple if inputs.has_cache else ''}"
        )
    return [(i, i + fixed) for i in range(0, length, fixed)]
