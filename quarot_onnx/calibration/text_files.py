r"""Texts in files: plain, as it is, or JSON lines.

A JSON line is an object with the text under a key, as in ``{"text": "..."}``. ``.jsonl`` and ``.ndjson`` files are read
that way, others where a key is named. The texts are joined by an empty line.
"""

import json
import re
from pathlib import Path

from quarot_onnx.errors import CalibrationError, did_you_mean
from quarot_onnx.io.links import refuse_broken

DEFAULT_KEY = "text"
JOINT = "\n\n"
"""Stands between the texts of two JSON lines."""

_SUFFIXES = frozenset({".jsonl", ".ndjson"})
_MARK = "\ufeff"
"""A byte order mark, which editors on Windows write: no text."""
_HALVES = re.compile("[\ud800-\udfff]")
"""What JSON's escapes can say and UTF-8 cannot."""
_BYTES = range(0xDC80, 0xDD00)
"""Those that Python has in place of bytes of a command line that are not UTF-8."""
_BEFORE = 20
"""Characters that show a place in a text."""


def is_json_lines(path: str | Path, key: str | None = None) -> bool:
    """Whether a file is read as JSON lines.

    Args:
        path: The file.
        key: The key that was named, if any.
    """
    return key is not None or Path(path).suffix.lower() in _SUFFIXES


def read_text(path: str | Path, key: str | None = None) -> str:
    """Read a text file whole.

    Args:
        path: A UTF-8 file; a byte order mark at its head is dropped, line ends are not translated.
        key: The key of the text in JSON lines; None for a plain text, and for ``text`` in .jsonl and .ndjson files.

    Raises:
        CalibrationError: It is missing, not UTF-8, or empty; or a line, named by its number, is no object with a text
            under the key.
    """
    path = Path(path)
    text = file_text(path)
    if is_json_lines(path, key):
        text = _joined(text, DEFAULT_KEY if key is None else key, path)
    if not text.strip():
        raise CalibrationError(f"the text {path} is empty: name a file with text in it")
    return text


def file_text(path: str | Path) -> str:
    """What is in a UTF-8 file, as it is, without a byte order mark at its head.

    Raises:
        CalibrationError: It is missing, or not UTF-8.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        refuse_broken(Path(path).absolute(), CalibrationError)
        raise CalibrationError(f"the text {path} cannot be read: {error.strerror}") from error
    return decoded(content, str(path))


def decoded(content: bytes, name: str) -> str:
    """The text of UTF-8 bytes, without a byte order mark at their head.

    Args:
        content: The bytes.
        name: What they are from, for messages.

    Raises:
        CalibrationError: They are not UTF-8.
    """
    try:
        return content.decode("utf-8").lstrip(_MARK)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"the text {name} is not UTF-8 (byte {error.start}): convert it first") from error


def require_characters(text: str, name: str) -> None:
    """Refuse what is in a string and is no character: no tokenizer takes it.

    Args:
        text: The string.
        name: What it is, for messages.

    Raises:
        CalibrationError: It holds half of a surrogate pair, as a byte that is not UTF-8 becomes on a command line.
    """
    half = _HALVES.search(text)
    if half is None:
        return
    start, code = half.start(), ord(half.group())
    place = f"behind {text[max(start - _BEFORE, 0) : start]!r}" if start else "at its start"
    if code in _BYTES:
        raise CalibrationError(f"{name} is not UTF-8 (byte 0x{code - 0xDC00:02x} {place}): convert it first")
    raise CalibrationError(f"{name} holds half of a surrogate pair, which is no character ({place}): take it out")


def _joined(content: str, key: str, path: Path) -> str:
    """The texts of all lines."""
    texts = []
    # Not splitlines: a JSON string may hold U+2028 and its like as they are.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            texts.append(_text_of(line, key, f"{path}, line {number}"))
    return JOINT.join(text for text in texts if text)


def _text_of(line: str, key: str, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        reason = getattr(error, "msg", str(error))
        raise CalibrationError(f"{place}: not JSON ({reason}); in JSON lines every line is an object") from None
    if not isinstance(record, dict):
        raise CalibrationError(f'{place}: a {type(record).__name__}, not an object such as {{"{key}": "..."}}')
    if key not in record:
        known = ", ".join(map(repr, record)) or "none"
        hint = did_you_mean(key, record)
        raise CalibrationError(f"{place}: no key {key!r}{hint}, its keys are {known}; name the text's with --text-key")
    text = record[key]
    if not isinstance(text, str):
        raise CalibrationError(f"{place}: {key!r} holds a {type(text).__name__}, no text; name another with --text-key")
    if _HALVES.search(text):
        raise CalibrationError(f"{place}: {key!r} holds half of a surrogate pair, which is no character: take it out")
    return text.lstrip(_MARK)
