"""Models with fewer positions than a window usually has tokens, from the command line: learned, or RoPE in tables."""

from pathlib import Path

import cached_decoder
import exports
import learned_positions as learned
import numpy as np
import pytest
from command_line import Shell

ROWS = 100
STATIC = ("--scheme", "w8a8-static")
CALIBRATED = (STATIC, ("--w-bits", 16, "--kv-bits", 4), ("--w-bits", 4, "--a-bits", 8))


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A text of 4,000 tokens."""
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{i}" for i in np.random.default_rng(0).integers(2, cached_decoder.VOCAB, 4000)))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return learned.write(tmp_path / "model", ROWS)


@pytest.mark.parametrize("scheme", CALIBRATED, ids=lambda scheme: "".join(map(str, scheme)))
def test_learned_positions(scheme: tuple[object, ...], model: Path, words: Path, shell: Shell, tmp_path: Path) -> None:
    done = shell.ok("quantize", model, tmp_path / "out", *scheme, "--calib-text", words, "--calib-samples", 4)
    assert f"calibrated on windows of {ROWS} tokens: the model has {ROWS} positions (rows of the table" in done.err
    assert "not checked" not in done.err
    assert shell.ok("compare", model, tmp_path / "out", "--text", words, "--json").json["kl"] >= 0
    assert shell.ok("evaluate", model, "--text", words, "--windows", 2, "--json").json["seq_len"] == ROWS


def test_tables_for_rope(shell: Shell, text: Path, tmp_path: Path) -> None:
    source = exports.genai_like()
    done = shell.ok("quantize", source, tmp_path / "out", *STATIC, "--calib-text", text, "--calib-samples", 2)
    assert "calibrated on windows of 128 tokens: the model has 128 positions" in done.err


def test_windows_that_were_asked_for(model: Path, words: Path, shell: Shell, tmp_path: Path) -> None:
    """They are refused before any work, with the option that makes them shorter."""
    too_long = f"windows of 120 tokens are longer than the {ROWS} positions"
    options = ("--calib-text", words, "--calib-samples", 4, "--calib-seq-len", 120)
    message = shell.fails("quantize", model, tmp_path / "out", *STATIC, *options)
    assert too_long in message
    assert f"use {ROWS} or fewer (--calib-seq-len" in message
    message = shell.fails("evaluate", model, "--text", words, "--windows", 2, "--seq-len", 120)
    assert too_long in message
    assert f"use {ROWS} or fewer (--seq-len" in message


@pytest.mark.parametrize("form", ["graph", "npz"])
def test_a_prefix_takes_positions(form: str, model: Path, words: Path, shell: Shell, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ("--calib-text", words, "--calib-samples", 4, "--no-bos")
    done = shell.ok("quantize", model, out, *STATIC, "--prefix", form, "--prefix-ids", "7,9,11", *options)
    assert f"windows of {ROWS - 3} tokens: the model has {ROWS - 3} positions" in done.err
    assert "not checked" not in done.err
    assert shell.ok("compare", model, out, "--text", words, "--json").json["tokens"] > 0
    longer = ("--prefix", form, "--prefix-ids", "7,9,11", *options, "--calib-seq-len", ROWS - 2)
    message = shell.fails("quantize", model, tmp_path / "longer", *STATIC, *longer)
    assert f"{ROWS - 3} positions" in message
    assert "--calib-seq-len" in message
    evaluate = ("evaluate", out, "--text", words, "--windows", 2, "--no-bos")
    assert shell.ok(*evaluate, "--json").json["seq_len"] == ROWS - 3
    message = shell.fails(*evaluate, "--seq-len", ROWS - 2)
    assert f"{ROWS - 3} positions" in message
    assert "without 3 for its prefix" in message


def test_a_table_that_is_not_found(words: Path, shell: Shell, tmp_path: Path) -> None:
    """Caches are calibrated where samples are; and windows that only a prefix makes too long are a note."""
    source = learned.write(tmp_path / "unseen", 256, "unseen")
    options = ("--calib-text", words, "--calib-samples", 4, "--calib-seq-len", 48, "--overwrite")
    shell.ok("quantize", source, tmp_path / "out", "--w-bits", 16, "--kv-bits", 4, *options)
    for form in ("graph", "npz"):
        prefixed = (*STATIC, "--prefix", form, "--prefix-ids", "7,9,11")
        done = shell.ok("quantize", source, tmp_path / "out", *prefixed, *options)
        assert "the quantized model was not checked: onnxruntime cannot run the model" in done.err
        assert "cannot run the model" in shell.fails(
            "quantize", source, tmp_path / "out", *prefixed, *options, "--max-kl", 1
        )
    message = shell.fails("quantize", source, tmp_path / "out", *STATIC, *options, "--calib-seq-len", 300)
    assert "cannot run sample 0" in message
    assert "shorter windows: --calib-seq-len" in message
