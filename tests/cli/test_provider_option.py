"""``--provider``: every command that runs models takes it, and what is recorded tells of it."""

import json
from pathlib import Path

import pytest
from command_line import Shell

AZURE = {"name": "AzureExecutionProvider", "options": {}}
STATIC = ("--scheme", "w8a8-static", "--calib-seq-len", 24, "--calib-samples", 3)


def commands(model: Path, other: Path, text: Path, folder: Path) -> dict[str, tuple[object, ...]]:
    return {
        "rotate": (model, folder / "r" / "model.onnx"),
        "quantize": (model, folder / "q" / "model.onnx", *STATIC, "--calib-text", text),
        "verify": (model, other),
        "compare": (model, other, "--text", text, "--tokens", 24),
        "evaluate": (model, "--text", text, "--windows", 1, "--seq-len", 24),
        "generate": (model, "--prompt", "The", "--max-new-tokens", 2),
    }


def test_every_command_runs_on_it(shell: Shell, model: Path, text: Path, tmp_path: Path) -> None:
    on = ("--provider", "azure", "--json")
    said = {
        name: shell.ok(name, *rest, *on).json for name, rest in commands(model, model, text, tmp_path / "out").items()
    }
    for command in ("verify", "compare", "evaluate"):
        assert said[command]["provider"] == AZURE
    rotated, quantized = (
        json.loads((tmp_path / "out" / folder / "model.quarot.json").read_text()) for folder in ("r", "q")
    )
    assert rotated["equivalence"]["provider"] == AZURE
    assert quantized["provider"] == AZURE


@pytest.mark.parametrize("command", ["rotate", "quantize", "verify", "compare", "evaluate", "generate"])
def test_it_is_refused_before_anything_is_done(
    command: str, shell: Shell, model: Path, text: Path, tmp_path: Path
) -> None:
    rest = commands(model, model, text, tmp_path / "out")[command]
    assert "DmlExecutionProvider is not in this build of" in shell.fails(command, *rest, "--provider", "dml")
    assert "--provider-option a=b: name the provider" in shell.fails(command, *rest, "--provider-option", "a=b")
    assert not (tmp_path / "out").exists()
