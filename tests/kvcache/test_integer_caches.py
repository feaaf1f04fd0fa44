"""A graph whose cache is of integers already, another tool's or ours: its weights are quantized, nothing is rotated."""

import shutil
from pathlib import Path

import exports
import numpy as np
import onnx
import pytest
from command_line import Shell, files

from quarot_onnx import KVCacheConfig, QConfig, QLayerConfig, QuarotConfig, UInt8Spec
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.readers import TokenReader
from quarot_onnx.errors import ModelError
from quarot_onnx.pipeline import quantize, rotate

KINDS = {"genai": "auto", "optimum": "head", "optimum, scales of tokens": "token"}


def kept_in_integers(kind: str, folder: Path, *, bare: bool = True) -> Path:
    """A float model with a cache of integers; bare: as another tool writes it, nothing is recorded."""
    source = exports.genai_like() if kind == "genai" else exports.optimum_export("llama")
    reader = TokenReader(ModelInputs.from_path(source), np.random.default_rng(0).integers(5, 100, (4, 24)))
    target = folder / "ours" / "model.onnx"
    quantize(source, target, QConfig(None, algo_config=[KVCacheConfig(8, 8, scales=KINDS[kind])]), reader, check=None)
    if not bare:
        return target
    model = onnx.load(target)
    del model.metadata_props[:]
    shutil.copytree(exports.optimum_export("llama").parent, folder / "theirs", ignore=shutil.ignore_patterns("*.onnx*"))
    for file in target.parent.glob("*config.json"):
        shutil.copy(file, folder / "theirs")
    onnx.save(model, folder / "theirs" / "model.onnx")
    return folder / "theirs" / "model.onnx"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_rotated_or_smoothed(shell: Shell, kind: str, tmp_path: Path) -> None:
    model, out, text = kept_in_integers(kind, tmp_path), tmp_path / "out", tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    few = ("--calib-text", text, "--calib-samples", 2, "--calib-seq-len", 65)
    smooth = ("--scheme", "w8a8-static", "--smooth-alpha", 0.5, "--no-rotate", *few)
    before = "the key/value cache is quantized already ('past_key_values.0.key' is INT8)"
    for command, options, way in (
        ("rotate", (), "without rotation (--no-rotate;"),
        ("rotate", ("--no-verify",), "without rotation (--no-rotate;"),
        ("quantize", (), "cannot be rotated: start from the export whose cache is float and quantize that here"),
        ("quantize", smooth, "cannot be smoothed: start from the export whose cache is float"),
    ):
        error = shell.fails(command, model, out / "model.onnx", *options)
        assert before in error
        assert way in error
        assert not out.exists()


def test_it_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kept_in_integers("genai", tmp_path)
    for late in ("prepare", "workspace", "prepared"):
        monkeypatch.setattr(f"quarot_onnx.pipeline.{late}", lambda *_, **__: pytest.fail("told after long work"))
    config = QConfig(QLayerConfig(weight=UInt8Spec(symmetric=True)), algo_config=[QuarotConfig()])
    with pytest.raises(ModelError, match="cannot be rotated"):
        quantize(model, tmp_path / "m.onnx", config)
    with pytest.raises(ModelError, match="cannot be rotated"):
        rotate(model, tmp_path / "m.onnx", QuarotConfig(r1=True))


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w4a8"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_quantized(shell: Shell, kind: str, scheme: str, tmp_path: Path) -> None:
    model, text = kept_in_integers(kind, tmp_path), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    few = ("--calib-text", text, "--calib-samples", 4, "--calib-seq-len", 65) if scheme == "w4a8" else ()
    result = shell.ok("quantize", model, tmp_path / "out", "--scheme", scheme, "--no-rotate", *few, "--json")
    check = result.json["check"]
    assert check["kl"] < {"w8a8-dynamic": 0.01, "w4a8": 0.1}[scheme]
    kinds = {
        value.name: value.type.tensor_type.elem_type for value in onnx.load(tmp_path / "out" / "model.onnx").graph.input
    }
    assert kinds["past_key_values.0.key"] == onnx.TensorProto.INT8


@pytest.mark.parametrize("command", ["rotate", "quantize"])
def test_ours_is_told_by_its_record(shell: Shell, command: str, tmp_path: Path) -> None:
    model = kept_in_integers("genai", tmp_path, bare=False)
    assert "the model is already quantized, as its recipe says" in shell.fails(
        command, model, tmp_path / "out" / "m.onnx"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_says_so(shell: Shell, kind: str, tmp_path: Path) -> None:
    model = kept_in_integers(kind, tmp_path)
    before = files(model.parent)
    content = shell.ok("inspect", model, "--json").json
    assert content["sites"] == {"R1": 0, "R2": 0, "R3": 0, "R4": 0}
    reasons = {(entry["rotation"], entry["reason"]) for entry in content["left_out"]}
    told = "the key/value cache is quantized already ('past_key_values.0.key' is INT8)"
    assert {(kind, told) for kind in ("R1", "R2", "R3", "R4")} <= reasons
    assert files(model.parent) == before
