"""A writable copy of a tiny export, and a shell."""

import shutil
from collections.abc import Callable
from pathlib import Path

import exports
import numpy as np
import numpy.typing as npt
import pytest
from command_line import Shell
from passed import Asks, Passed

from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.cli import calibrating, quantizing
from quarot_onnx.config import QConfig
from quarot_onnx.io.model_io import SavedModel
from quarot_onnx.pipeline import Outcome


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An export with its tokenizer, in a folder of its own."""
    folder = tmp_path / "model"
    shutil.copytree(exports.optimum_export("llama").parent, folder)
    return folder / "model.onnx"


@pytest.fixture(autouse=True)
def quick_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of any tokens in place of what the model would write: a second for each test where it matters to none."""

    def instead(_path: Path, windows: int, length: int, **_options: object) -> npt.NDArray[np.int64]:
        return np.random.default_rng(0).integers(0, 256, (windows, length))

    monkeypatch.setattr(calibrating, "own_windows", instead)


@pytest.fixture
def asks(shell: Shell, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asks:
    """Run ``quantize`` up to the pipeline."""

    def ask(*options: object, source: Path = model) -> Passed:
        passed = Passed()

        def instead(source: Path, target: Path, config: QConfig, reader: TextReader | None, **more: object) -> Outcome:
            passed.config, passed.reader = config, reader
            return Outcome(SavedModel(target, None, 0, None), {}, None, None, config.notes, {})

        monkeypatch.setattr(quantizing, "quantize", instead)
        passed.notes = shell.ok("quantize", source, tmp_path / "out.onnx", *options).err
        return passed

    return ask


@pytest.fixture
def refused_early(shell: Shell, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run ``quantize`` with what must fail before the pipeline."""
    monkeypatch.setattr(quantizing, "quantize", lambda *_, **__: pytest.fail("reached the pipeline"))

    def check(*options: object, source: Path = model) -> str:
        return shell.fails("quantize", source, tmp_path / "out.onnx", *options)

    return check
