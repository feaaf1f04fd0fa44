"""Text that any model predicts easily is told from text that a perplexity means something on."""

from pathlib import Path

import exports
import numpy as np
import pytest
import tiny_decoders as tiny

from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.calibration.running_text import running_text_note
from quarot_onnx.calibration.text import default_text, load_tokenizer, tokenize
from quarot_onnx.evaluation.perplexity import perplexity


@pytest.fixture
def unlike() -> str:
    """Text half of which is one letter, for the tokenizer of the tiny exports, which takes letters."""
    return "aabacaad" * 200


def varied(count: int, of: int, often: float) -> np.ndarray:
    """Ids of which one takes a given share, all others are equally likely."""
    rng = np.random.default_rng(0)
    return np.where(rng.random(count) < often, 5, rng.integers(6, of, count))


@pytest.mark.parametrize(("often", "told"), [(0.05, False), (0.15, True)])
def test_one_token_that_makes_up_much(often: float, told: bool) -> None:
    note = running_text_note(varied(3000, tiny.VOCAB, often), tiny.tokenizer(), "the text")
    assert bool(note) == told
    if told:
        assert note[0].startswith("the text is unlike running text: the token 'w5' is 1")


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


def test_calibration_and_evaluation_tell(unlike: str, tmp_path: Path) -> None:
    source, text = exports.optimum_export("llama"), tmp_path / "text.txt"
    text.write_text(unlike)
    for notes in (
        TextReader(source, text, samples=2, seq_len=64).notes,
        perplexity(source, text, source.parent, seq_len=64, windows=2).notes,
    ):
        assert [note for note in notes if note.startswith(f"{text} is unlike running text: the token 'a' is 6")]
