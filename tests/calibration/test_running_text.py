"""Text that any model predicts easily is told from text that a perplexity means something on."""

from pathlib import Path

import numpy as np
import pytest
import tiny_decoders as tiny

from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.calibration.running_text import running_text_note
from quarot_onnx.calibration.text import default_text, load_tokenizer, tokenize
from quarot_onnx.evaluation.perplexity import perplexity


def varied(count: int, of: int, often: float) -> np.ndarray:
    """Ids of which one takes a given share, all others are equally likely."""
    rng = np.random.default_rng(0)
    return np.where(rng.random(count) < often, 505 % of, rng.integers(6, of, count))


@pytest.mark.parametrize(("often", "told"), [(0.05, False), (0.15, True)])
def test_one_token_that_makes_up_much(often: float, told: bool, smollm2_export: Path) -> None:
    tokenizer = load_tokenizer(smollm2_export.parent)
    note = running_text_note(varied(3000, 40_000, often), tokenizer, "the text")
    assert bool(note) == told
    if told:
        assert note[0].startswith(f"the text is unlike running text: the token {tokenizer.decode([505])!r} is 1")
    assert running_text_note(varied(3000, tiny.VOCAB, often), tiny.tokenizer(), "letters") == ()


@pytest.mark.parametrize(("every", "told"), [(18, True), (1000, False)])
def test_words_that_are_left_out(every: int, told: bool, smollm2_export: Path) -> None:
    """One word in eighteen is no more frequent than `` the``: what it is called tells."""
    words = default_text().split()[:6000]
    words[::every] = ["<unk>"] * len(words[::every])
    tokenizer = load_tokenizer(smollm2_export.parent)
    note = running_text_note(tokenize(" ".join(words), tokenizer), tokenizer, "the text")
    assert [("one word in 18 is <unk>" in text) for text in note] == [True] * told


def test_running_text_is_not_told_of(smollm2_export: Path) -> None:
    """English prose with code in it."""
    tokenizer = load_tokenizer(smollm2_export.parent)
    assert running_text_note(tokenize(default_text()[:60_000], tokenizer), tokenizer, "the text") == ()


def test_calibration_and_evaluation_tell(tmp_path: Path) -> None:
    source, text = tiny.save(tiny.build(tiny.Spec()), tmp_path), tmp_path / "text.txt"
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    text.write_text("w5 w6 w7 w8 w9 w10 w11 other " * 50)
    for notes in (
        TextReader(source, text, samples=2, seq_len=64).notes,
        perplexity(source, text, source.parent, seq_len=64, windows=2).notes,
    ):
        assert [note for note in notes if note.startswith(f"{text} is unlike running text: one word in 8 is <unk>")]
