"""Windows from all over a text."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from exports import optimum_export
from tokenizers import Tokenizer, models, pre_tokenizers

from quarot_onnx.calibration import text
from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.calibration.spreading import spread_windows
from quarot_onnx.errors import ShortTextError


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
    cut, between = spread_windows(content, tokenizer, length=4, count=4, bos_id=1, more=8)
    np.testing.assert_array_equal(cut, [[1, 10, 11, 12], [1, 20, 21, 22], [1, 30, 31, 32], [1, 40, 41, 42]])
    np.testing.assert_array_equal(between, [13, 14, 23, 24, 33, 34, 43, 44])


def test_a_place_within_a_line_is_left_for_the_next_one(tokenizer: Tokenizer) -> None:
    content = words(range(10, 40), line=10)
    cut, _ = spread_windows(content, tokenizer, length=3, count=2, bos_id=None, more=0)
    np.testing.assert_array_equal(cut, [[10, 11, 12], [30, 31, 32]])  # the middle of the text is in the second line


def test_long_lines_are_entered_at_a_word(tokenizer: Tokenizer) -> None:
    ids = [10 + i % 80 for i in range(8000)]
    cut, between = spread_windows(words(ids, 8000), tokenizer, length=5, count=2, bos_id=None, more=4)
    np.testing.assert_array_equal(cut, [ids[:5], ids[4000:4005]])
    np.testing.assert_array_equal(between, [*ids[5:7], *ids[4005:4007]])


def test_a_bos_in_the_text_serves(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens(["<s>"])
    content = words(range(10, 22), 12) + "\n<s> " + words(range(22, 32), 10)
    cut, between = spread_windows(content, tokenizer, length=4, count=2, bos_id=1, more=4)
    np.testing.assert_array_equal(cut, [[1, 10, 11, 12], [1, 22, 23, 24]])
    np.testing.assert_array_equal(between, [13, 14, 25, 26])


@pytest.mark.parametrize(
    ("content", "length", "count", "message"),
    [
        (words(range(10, 17)), 4, 3, "^part 2 of 3 has 0 tokens, and a window takes 3: give more text$"),
        ("w5", 4, 3, "^part 1 of 3 has 0 tokens, and a window takes 3"),
        ("w5", 4, 1, "^all of it has 1 token, and a window takes 3"),
        (words(range(10, 50)), 1, 3, "^windows of 1 tokens hold no text"),
        (words(range(10, 50)), 9, 10**18, f"^part 1 of {10**18} has 0 tokens, and a window takes 8"),
        (words(range(10, 30)) + " " + "x" * 200_000 + " " + words(range(10, 30)), 4, 3, "^part 2 of 3 has"),
    ],
)
def test_a_part_that_is_too_short_is_told(
    tokenizer: Tokenizer, content: str, length: int, count: int, message: str
) -> None:
    with pytest.raises(ShortTextError, match=message):
        spread_windows(content, tokenizer, length=length, count=count, bos_id=1, more=8)


@pytest.mark.parametrize("blank", ["\n" * 5000, " \n\t" * 3000, " " * 5000, "\r\n" * 3000])
def test_a_blank_stretch_is_no_part_of_a_text(tokenizer: Tokenizer, blank: str) -> None:
    ids = list(range(10, 50))
    plain = spread_windows(words(ids), tokenizer, length=4, count=4, bos_id=1, more=8)
    for gap in (0, 15, 20, 40):  # at the ends, in a part, and between two
        content = words(ids[:gap]) + blank + words(ids[gap:])
        cut, between = spread_windows(content, tokenizer, length=4, count=4, bos_id=1, more=8)
        starts = cut[:, 1].tolist()
        assert starts == sorted(starts)
        assert np.abs(cut - plain[0]).max() <= 5, "a line further on, as the blank has some characters left"
        assert cut.size + between.size >= 16
        # None twice, none out of its order.
        assert all(row == list(range(row[0], row[0] + 3)) for row in cut[:, 1:].tolist())
        assert all(later - earlier >= 3 for earlier, later in pairwise(starts))


def test_fewer_blanks_change_nothing(tokenizer: Tokenizer) -> None:
    """As the tokens show, which here are characters."""
    letters = Tokenizer(models.WordLevel({"?": 0, "\n": 1, "w": 2, "x": 3}, "?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    for blanks, counted in ((256, 256), (257, 2)):
        content = "w\n" + "\n" * (blanks - 1) + "x" * 300
        cut, between = spread_windows(content, letters, length=200, count=1, bos_id=None, more=10**6)
        assert np.count_nonzero(np.concatenate([cut[0], between]) == 1) == counted


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
    reason = "part 3 of 13 has 20 tokens, and a window takes 29; ask for fewer or shorter ones, or give more text"
    note = f"windows follow each other from the start of {long} and are not from all over it: {reason}"
    assert reader.notes == (note, *plain.notes)
    assert reader.record == plain.record
    np.testing.assert_array_equal(reader.token_windows, plain.token_windows)
    np.testing.assert_array_equal(reader.rest, plain.rest)
    np.testing.assert_array_equal(reader.token_windows[1, 1:4], [39, 40, 41])


def test_a_blank_stretch_sends_nobody_to_the_start(long: Path) -> None:
    content = long.read_text()
    long.write_text(content[:700] + "\n" * 200_000 + content[700:])
    reader = reader_of(long, 4)
    assert reader.spread
    assert not any("from the start" in note for note in reader.notes)
    assert len(set(reader.token_windows[:, 1].tolist())) == 4


def test_little_of_a_long_text_is_tokenized(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    asked: list[int | None] = []
    monkeypatch.setattr(
        "quarot_onnx.calibration.spreading.tokenize",
        lambda part, made, first: asked.append(first) or text.tokenize(part, made, first),
    )
    spread_windows(words([10] * 40_000), tokenizer, length=16, count=8, bos_id=None, more=80)
    assert asked == [26] * 8
