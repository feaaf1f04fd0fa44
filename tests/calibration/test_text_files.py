"""Plain texts and JSON lines."""

import json
from pathlib import Path

import pytest

from quarot_onnx.calibration.text_files import read_text, require_characters
from quarot_onnx.errors import CalibrationError


def lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\xef\xbb\xbf" * 2])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(mark + "Grüße\r\n".encode())
    assert read_text(path) == "Grüße\r\n"
    path.write_bytes(mark)
    with pytest.raises(CalibrationError, match="is empty"):
        read_text(path)
    path = tmp_path / "text.jsonl"
    path.write_bytes(mark + '{"text": "\ufeffone"}\r\n\r\n{"text": "two\u2028three"}'.encode())
    assert read_text(path) == "one\n\ntwo\u2028three"


def test_json_lines_are_joined_by_an_empty_line(tmp_path: Path) -> None:
    records = [{"text": "a\nb", "id": 1}, {"id": 2, "text": ""}, {"text": "c"}]
    for name in ("text.jsonl", "text.NDJSON"):
        assert read_text(lines(tmp_path / name, *records)) == "a\nb\n\nc"
    path = lines(tmp_path / "text.json", *[{"content": record["text"]} for record in records])
    assert read_text(path, "content") == "a\nb\n\nc"
    assert read_text(path).startswith('{"content"'), "a plain text where nothing says otherwise"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"plain", r"text.jsonl, line 2: not JSON \(Expecting value\)"),
        (b'{"text": "cut', r"line 2: not JSON"),
        (b'["a"]', r'line 2: a list, not an object such as \{"text": "\.\.\."\}'),
        (b'{"txt": "a"}', r"line 2: no key 'text' \(did you mean 'txt'\?\), its keys are 'txt'; .*--text-key"),
        (b"{}", r"line 2: no key 'text', its keys are none"),
        (b'{"text": ["a"]}', r"line 2: 'text' holds a list, no text"),
        (b'{"text": null}', r"line 2: 'text' holds a NoneType, no text"),
        (b'{"text": "\\ud83d"}', r"line 2: 'text' holds half of a surrogate pair"),
    ],
)
def test_what_is_wrong_is_told_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(CalibrationError, match=message):
        read_text(path)


def test_json_lines_without_text(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="is empty"):
        read_text(lines(tmp_path / "text.jsonl", {"text": ""}, {"text": " "}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a" * 30 + "caf\udce9", r"^it is not UTF-8 \(byte 0xe9 behind 'a{17}caf'\): convert it first$"),
        ("\udc80 and \udcff", r"^it is not UTF-8 \(byte 0x80 at its start\)"),
        ("x\ud83d", r"^it holds half of a surrogate pair, which is no character \(behind 'x'\): take it out$"),
        ("\udc7f", "half of a surrogate pair"),
        ("\udd00", "which is no character .at its start"),
    ],
)
def test_what_is_no_character(text: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        require_characters(text, "it")
    require_characters("Grüße, 世界 \U0001f600", "it")
