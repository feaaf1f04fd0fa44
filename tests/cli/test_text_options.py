"""Texts, BOS and JSON lines on the command line and in recipes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Shell
from passed import Asks

W4 = ("--weights", "gptq", "--lm-head", "int8")
SHORT = ("--calib-samples", 8, "--calib-seq-len", 64)


def test_evaluate_says_which_bos_and_why(shell: Shell, model: Path, text: Path) -> None:
    def evaluate(*options: object) -> dict[str, object]:
        return shell.ok("evaluate", model, "--text", text, "--seq-len", 32, "--windows", 2, "--json", *options).json

    found = evaluate()
    assert (found["bos_id"], found["bos_why"]) == (256, "tokenizer_config.json: bos_token '<s>'")
    assert evaluate("--no-bos")["bos_id"] is None
    assert evaluate("--bos-id", 7)["bos_id"] == 7
    assert "BOS" in shell.ok("evaluate", model, "--text", text, "--seq-len", 32, "--windows", 2).out
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((model.parent / name).read_text())
        (model.parent / name).write_text(json.dumps(content | {"bos_token": None}))
    found, forced = evaluate(), evaluate("--bos")
    assert (found["bos_id"], found["bos_why"]) == (None, "tokenizer_config.json: bos_token is null")
    assert (forced["bos_id"], forced["bos_why"]) == (256, "asked for, config.json: bos_token_id 256")
    assert found["perplexity"] != forced["perplexity"]


def test_bos_that_cannot_be(shell: Shell, model: Path, text: Path) -> None:
    line = shell.fails("evaluate", model, "--text", text, "--bos-id", 5, "--no-bos")
    assert "--bos-id 5 contradicts --no-bos" in line
    line = shell.fails("evaluate", model, "--text", text, "--bos-id", 999, "--seq-len", 32, "--windows", 1)
    assert "token id 999 is outside" in line
    (model.parent / "tokenizer_config.json").write_text('{"bos_token": "<|nope|>"}')
    assert "--bos-id N" in shell.fails("evaluate", model, "--text", text)
    shell.ok("evaluate", model, "--text", text, "--no-bos", "--seq-len", 32, "--windows", 1)
    shell.ok("verify", model, model)


def test_quantize_says_which_bos_and_why(shell: Shell, model: Path, text: Path, tmp_path: Path) -> None:
    command = ("quantize", model, tmp_path / "out", *W4, "--calib-text", text, *SHORT)
    why = "tokenizer_config.json: bos_token '<s>'"
    assert f"calibrated: BOS id 256 in front of every window ({why})" in shell.ok(*command).out
    assert shell.ok(*command, "--json").json["bos"] == {"id": 256, "why": why}
    assert "calibrated: BOS none (asked for)" in shell.ok(*command, "--no-bos").out
    assert shell.ok("quantize", model, tmp_path / "int8", "--json").json["bos"] is None


def test_bos_and_text_key_reach_the_reader(asks: Asks, tmp_path: Path) -> None:
    lines = tmp_path / "lines.json"
    lines.write_text('{"content": "' + "The quick brown fox. " * 60 + '"}\n')
    passed = asks(*W4, "--calib-text", lines, "--text-key", "content", "--bos-id", 5, "--calib-own", 0, *SHORT)
    assert passed.reader is not None
    assert (passed.reader.token_windows[:, 0] == 5).all()
    plain = tmp_path / "plain.txt"
    plain.write_text("The quick brown fox. " * 60)
    other = asks(*W4, "--calib-text", plain, "--bos-id", 5, "--calib-own", 0, *SHORT)
    assert other.reader is not None
    assert other.reader.token_windows.tolist() == passed.reader.token_windows.tolist()
    recipe = tmp_path / "r.yaml"
    for said, bos in (("false", None), ("true", 256), ("7", 7), ("null", 256)):
        recipe.write_text(
            "rotation: {}\nweights: {method: gptq}\nlm_head: int8\n"
            f"calibration: {{text: lines.json, text_key: content, samples: 8, seq_len: 64, bos: {said}}}\n"
        )
        own = asks("--recipe", recipe)
        assert own.reader is not None
        assert own.reader.bos_id == bos
        wins = asks("--recipe", recipe, "--no-bos")
        assert wins.reader is not None
        assert wins.reader.bos_id is None
    assert "nothing is calibrated: --bos not used" in asks("--bos", "--no-check").notes
    assert "not used" not in asks("--bos").notes, "the check reads text, too"


def test_what_contradicts_is_refused(refused_early: Callable[..., str], tmp_path: Path) -> None:
    assert "--bos-id 1 contradicts --bos;" in refused_early(*W4, "--bos", "--bos-id", 1)
    assert "--bos-id 1 contradicts --no-bos;" in refused_early(*W4, "--no-bos", "--bos-id", 1)
    assert "goes with JSON lines: name a text" in refused_early(*W4, "--text-key", "content")
    recipe = tmp_path / "r.yaml"
    for said in ("yes please", "-1", "1.0"):
        recipe.write_text(f"weights: {{method: gptq}}\ncalibration: {{bos: {said}}}\n")
        assert "calibration.bos" in refused_early("--recipe", recipe)
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "fine"}\n{"txt": "not"}\n')
    assert "lines.jsonl, line 2: no key 'text'" in refused_early(*W4, "--calib-text", lines)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_json_lines_and_text_are_the_same_text(shell: Shell, model: Path, tmp_path: Path, suffix: str) -> None:
    parts = ["The quick brown fox jumps over the lazy dog." * 3, "And it jumps back again." * 4]
    path = tmp_path / f"text.{suffix}"
    path.write_text("\n\n".join(parts) if suffix == "txt" else "".join(json.dumps({"text": p}) + "\n" for p in parts))
    found = shell.ok("evaluate", model, "--text", path, "--seq-len", 32, "--windows", 0, "--json").json
    assert found["tokens"] == (sum(map(len, parts)) + 2) // 31 * 31
    assert ("JSON lines" in str(found["joining"])) == (suffix == "jsonl")


def test_windows_longer_than_the_model_are_told(shell: Shell, model: Path, text: Path, tmp_path: Path) -> None:
    config = json.loads((model.parent / "config.json").read_text())
    (model.parent / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    said = "windows of 64 tokens are longer than the 40 positions that the model was made for (max_position_embeddings"
    evaluate = ("evaluate", model, "--text", text, "--windows", 1, "--json", "--seq-len")
    result = shell.ok(*evaluate, 64)
    assert said in result.err
    assert said in result.json["notes"][0]
    assert not shell.ok(*evaluate, 40).err
    command = ("quantize", model, tmp_path / "out", *W4, "--calib-text", text, *SHORT)
    assert said in shell.ok(*command).err
