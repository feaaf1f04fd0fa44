"""Models that no rule can feed, and models of fixed lengths, on the command line: each way out exists."""

from pathlib import Path

import numpy as np
import odd_decoders as odd
import pytest
import tiny_decoders as tiny
from command_line import Shell

EMPTY = {
    f"past_key_values.0.{part}": np.zeros((1, odd.HEADS, 0, odd.HEAD_DIM), np.float32) for part in ("key", "value")
}
IDS = np.random.default_rng(0).integers(0, odd.VOCAB, (1, 100))
KNOWN = {"input_ids": IDS, "temperature": np.ones(1, np.float32), **EMPTY}


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    """A model with an input that no rule knows."""
    return odd.write(tmp_path / "unknown", odd.Spec(unknown=True))


def saved(folder: Path, arrays: dict[str, np.ndarray], name: str = "feeds.npz") -> Path:
    np.savez(folder / name, **arrays)
    return folder / name


def with_tokenizer(folder: Path, spec: odd.Spec) -> Path:
    path = odd.write(folder, spec)
    tiny.tokenizer(odd.VOCAB).save(str(folder / "tokenizer.json"))
    return path


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{i}" for i in np.random.default_rng(1).integers(2, odd.VOCAB, 4000)))
    return path


@pytest.mark.parametrize("command", ["rotate", "quantize"])
def test_the_message_names_what_there_is(command: str, unknown: Path, shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model.onnx"
    message = shell.fails(command, unknown, out)
    assert "'temperature'" in message
    assert "--feeds FILE.npz" in message
    assert "--no-verify" in message
    assert not out.exists()
    shell.ok(command, unknown, out, "--no-verify")
    assert "proved: " in shell.ok(command, unknown, out, "--feeds", saved(tmp_path, KNOWN)).out
    assert "--feeds not used" in shell.ok(command, unknown, out, "--feeds", saved(tmp_path, KNOWN), "--no-verify").err


def test_verify_and_evaluate(unknown: Path, shell: Shell, words: Path, tmp_path: Path) -> None:
    rotated = tmp_path / "rotated" / "model.onnx"
    shell.ok("rotate", unknown, rotated, "--no-verify")
    message = shell.fails("verify", unknown, rotated)
    assert "--feeds FILE.npz" in message
    assert "--no-verify" not in message
    feeds = saved(tmp_path, KNOWN)
    assert shell.ok("verify", unknown, rotated, "--feeds", feeds, "--json").json["tokens"] == 100
    other = odd.write(tmp_path / "other", odd.Spec(unknown=True), seed=1)
    assert shell("verify", unknown, other, "--feeds", feeds).status == 1
    tiny.tokenizer(odd.VOCAB).save(str(unknown.parent / "tokenizer.json"))
    message = shell.fails("evaluate", unknown, "--text", words)
    assert "'temperature'" in message
    assert "--feeds" not in message


WRONG = {
    "unknown name": ({**KNOWN, "temprature": KNOWN["temperature"]}, "'temprature' is no input", "did you mean 'temp"),
    "missing": (
        {k: v for k, v in KNOWN.items() if k != "temperature"},
        "no array for the input 'temperature'",
        "FLOAT",
    ),
    "missing cache": ({k: v for k, v in KNOWN.items() if "key" not in k[-4:]}, "'past_key_values.0.key'", "FLOAT"),
    "type": ({**KNOWN, "temperature": np.ones(1)}, "'temperature' is float64 [1]", "FLOAT [1]"),
    "rank": ({**KNOWN, "temperature": np.ones((1, 1), np.float32)}, "'temperature' is float32 [1, 1]", "FLOAT [1]"),
    "length": ({**KNOWN, "temperature": np.ones(2, np.float32)}, "'temperature' is float32 [2]", "FLOAT [1]"),
    "ids": (
        {**KNOWN, "input_ids": IDS + odd.VOCAB},
        "onnxruntime cannot run the model on input_ids [1, 100]",
        "--feeds",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_feeds(case: str, unknown: Path, shell: Shell, tmp_path: Path) -> None:
    arrays, what, more = WRONG[case]
    message = shell.fails("rotate", unknown, tmp_path / "out.onnx", "--feeds", saved(tmp_path, arrays))
    assert what in message
    assert more in message


def test_feeds_that_cannot_be_read(unknown: Path, shell: Shell, tmp_path: Path, words: Path) -> None:
    (tmp_path / "empty").mkdir()
    wrong = {tmp_path / "absent.npz": "no .npz file at", words: "no .npz archive", tmp_path / "empty": "holds no .npz"}
    for source, what in wrong.items():
        assert what in shell.fails("rotate", unknown, tmp_path / "out.onnx", "--feeds", source)


@pytest.mark.parametrize("options", [["--scheme", "w8a8-static"], ["--weights", "gptq", "--w-bits", "4"]])
@pytest.mark.parametrize("spec", [odd.Spec(unknown=True), odd.Spec(ids="embedded")])
def test_calibration_on_feeds(spec: odd.Spec, options: list[str], shell: Shell, tmp_path: Path, words: Path) -> None:
    source, out, folder = odd.write(tmp_path / "a", spec), tmp_path / "out" / "model.onnx", tmp_path / "samples"
    message = shell.fails("quantize", source, out, *options, "--calib-text", words)
    assert "give calibration samples (--feeds FILE.npz" in message
    folder.mkdir()
    for number in range(2):
        embedded = np.random.default_rng(number).standard_normal((1, 100, odd.HIDDEN)).astype(np.float32)
        arrays = KNOWN if spec.unknown else {"inputs_embeds": embedded, **EMPTY}
        saved(folder, arrays, f"{number}.npz")
    printed = shell.ok("quantize", source, out, *options, "--feeds", folder)
    assert f"calibrated on {folder}" in printed.err
    assert "over 200 tokens" in printed.out


@pytest.mark.parametrize(
    ("spec", "length", "again"),
    [
        (odd.Spec(batch=1, seq=16, past=0), 16, 32),
        (odd.Spec(batch=3, seq=16, past=0), 16, 32),
        (odd.Spec(batch=1, seq=1, past=15, mask="ones"), 16, 0),
        (odd.Spec(batch=1, seq=4, mask="bias"), 256, 30),
    ],
)
def test_fixed_lengths(spec: odd.Spec, length: int, again: int, shell: Shell, tmp_path: Path, words: Path) -> None:
    source, out = with_tokenizer(tmp_path / "a", spec), tmp_path / "out" / "model.onnx"
    calibration = ["--calib-text", words, "--calib-samples", 4]
    printed = shell.ok("quantize", source, out, "--scheme", "w8a8-static", *calibration)
    assert f"calibrated on windows of {length} tokens" in printed.err
    shell.ok("quantize", source, out, "--weights", "gptq", "--w-bits", 4, *calibration, "--calib-seq-len", length)
    found = shell.ok("evaluate", out, "--text", words, "--windows", 3, "--json").json
    assert found["seq_len"] == length
    if again:
        message = shell.fails(
            "quantize", source, out, "--scheme", "w8a8-static", *calibration, "--calib-seq-len", again
        )
        assert f"windows have {again} tokens" in message
        assert f"windows have {again} tokens" in shell.fails("evaluate", out, "--text", words, "--seq-len", again)


def test_windows_in_pieces_have_the_perplexity_of_whole_ones(shell: Shell, tmp_path: Path, words: Path) -> None:
    specs = [odd.Spec(), odd.Spec(batch=2), odd.Spec(batch=1, seq=1), odd.Spec(batch=1, seq=8, past=56, mask="ones")]
    sources = [with_tokenizer(tmp_path / str(i), spec) for i, spec in enumerate(specs)]
    asked = ["--text", words, "--seq-len", 64, "--windows", 3, "--json"]
    first, *others = [shell.ok("evaluate", source, *asked).json["perplexity"] for source in sources]
    # Float32 logits of about 3: a few roundings of 6e-8 each.
    assert others == pytest.approx([first] * 3, rel=1e-5)
