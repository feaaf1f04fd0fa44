"""Windows from all over a text."""

from pathlib import Path

import numpy as np
import pytest
from exports import optimum_export
from tokenizers import Tokenizer, models, pre_tokenizers

from quarot_onnx.calibration import text
from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.calibration.spreading import spread_windows


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Of the words w2 to w89, in the order of their ids."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, 90)}}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def words(ids: range | list[int], line: int = 5) -> str:
    """A text of words, some to a line."""
    return "\n".join(" ".join(f"w{i}" for i in ids[top : top + line]) for top in range(0, len(ids), line))


def test_they_begin_with_lines_all_over_the_text(tokenizer: Tokenizer) -> None:
    content = words(range(10, 50))
    found = spread_windows(content, tokenizer, length=4, count=4, bos_id=1, more=8)
    assert found is not None
    cut, between = found
    np.testing.assert_array_equal(cut, [[1, 10, 11, 12], [1, 20, 21, 22], [1, 30, 31, 32], [1, 40, 41, 42]])
    np.testing.assert_array_equal(between, [13, 14, 23, 24, 33, 34, 43, 44])


def test_a_place_within_a_line_is_left_for_the_next_one(tokenizer: Tokenizer) -> None:
    content = words(range(10, 40), line=10)
    cut, _ = spread_windows(content, tokenizer, length=3, count=2, bos_id=None, more=0) or pytest.fail("none")
    np.testing.assert_array_equal(cut, [[10, 11, 12], [30, 31, 32]])  # the middle of the text is in the second line


def test_long_lines_are_entered_at_a_word(tokenizer: Tokenizer) -> None:
    ids = [10 + i % 80 for i in range(8000)]
    cut, between = spread_windows(words(ids, 8000), tokenizer, length=5, count=2, bos_id=None, more=4) or pytest.fail(
        "none"
    )
    np.testing.assert_array_equal(cut, [ids[:5], ids[4000:4005]])
    np.testing.assert_array_equal(between, [*ids[5:7], *ids[4005:4007]])


def test_a_bos_in_the_text_serves(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens(["<s>"])
    content = words(range(10, 22), 12) + "\n<s> " + words(range(22, 32), 10)
    cut, between = spread_windows(content, tokenizer, length=4, count=2, bos_id=1, more=4) or pytest.fail("none")
    np.testing.assert_array_equal(cut, [[1, 10, 11, 12], [1, 22, 23, 24]])
    np.testing.assert_array_equal(between, [13, 14, 25, 26])


@pytest.mark.parametrize(("content", "length"), [(words(range(10, 17)), 4), ("w5", 4), (words(range(10, 50)), 1)])
def test_none_where_a_part_is_too_short(tokenizer: Tokenizer, content: str, length: int) -> None:
    assert spread_windows(content, tokenizer, length=length, count=3, bos_id=1, more=8) is None


@pytest.fixture
def long(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A text of eighty words, again and again, and the tokenizer beside it."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "long.txt"
    path.write_text(words([10 + i % 80 for i in range(400)], 20))
    return path


def reader_of(text: Path, samples: int, *, spread: bool = True) -> TextReader:
    """For windows of 30 tokens."""
    return TextReader(optimum_export("llama"), text, text.parent, samples=samples, seq_len=30, bos=1, spread=spread)


def test_what_is_in_no_window_is_left_for_the_check(long: Path) -> None:
    reader = reader_of(long, 4)
    assert reader.spread
    np.testing.assert_array_equal(reader.token_windows[:, 1], [10, 30, 50, 70])  # every hundredth word
    left = [10 + i % 80 for start in range(0, 400, 100) for i in range(start + 29, start + 100)]
    np.testing.assert_array_equal(reader.rest, left)


def test_a_short_text_is_read_from_its_start(long: Path) -> None:
    reader, plain = (reader_of(long, 13, spread=way) for way in (True, False))
    assert not reader.spread
    assert reader.record == plain.record
    np.testing.assert_array_equal(reader.token_windows, plain.token_windows)
    np.testing.assert_array_equal(reader.rest, plain.rest)
    np.testing.assert_array_equal(reader.token_windows[1, 1:4], [39, 40, 41])


def test_little_of_a_long_text_is_tokenized(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    asked: list[int | None] = []
    monkeypatch.setattr(
        "quarot_onnx.calibration.spreading.tokenize",
        lambda part, made, first: asked.append(first) or text.tokenize(part, made, first),
    )
    spread_windows(words([10] * 40_000), tokenizer, length=16, count=8, bos_id=None, more=80)
    assert asked == [26] * 8
