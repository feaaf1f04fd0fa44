"""Numbers in configurations: what stands for float, and what was written as something else.

That is in quotes, or so that YAML 1.1 takes it for text.
"""

import math

FLOAT_BITS = 16
"""The number of bits that leaves a tensor in float."""


def as_number(value: object, *, whole: bool) -> str | None:
    """How to write a value that means a number and is none.

    Args:
        value: What was given.
        whole: Whether a whole number is wanted.

    Returns:
        What is wanted and how to write it; None where the value does not mean such a number.
    """
    if not isinstance(value, str | float):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    if not math.isfinite(number) or (whole and not number.is_integer()):
        return None
    text = isinstance(value, str)
    if whole:
        return f"a whole number{' without quotes' if text else ''} is wanted; write {int(number)}"
    exponent = " (YAML takes 1e-2 for text and 1.0e-2 for a number)" if "e" in str(value).lower() else ""
    return f"a number without quotes is wanted; write {_plain(number)}{exponent}" if text else None


def refuse_disguised(value: object) -> None:
    """Raise ValueError where a value means a whole number and is none."""
    hint = as_number(value, whole=True)
    if hint is not None:
        raise ValueError(hint)


def _plain(number: float) -> str:
    """A number as YAML 1.1 reads it: with a point before an exponent."""
    mantissa, *exponent = repr(number).split("e")
    return mantissa if not exponent else f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent[0]}"
