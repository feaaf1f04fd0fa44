"""A writable copy of a tiny export, and a shell."""

import shutil
from pathlib import Path

import exports
import pytest
from command_line import Shell


@pytest.fixture
def shell(capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capfd)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An export with its tokenizer, in a folder of its own."""
    folder = tmp_path / "model"
    shutil.copytree(exports.optimum_export("llama").parent, folder)
    return folder / "model.onnx"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return path
