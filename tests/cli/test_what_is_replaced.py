"""What commands replace, and the paths that their refusals name."""

import shutil
from pathlib import Path

import exports
import pytest
from command_line import Shell, files

from quarot_onnx.io import model_io

W8 = ("--scheme", "w8", "--no-rotate")


@pytest.mark.parametrize("command", [("quantize", *W8), ("rotate", "--no-verify")])
def test_a_project_keeps_its_config(command: tuple[str, ...], shell: Shell, model: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text("settings")
    before = files(project)
    first, *options = command
    for out in (project, project / "small.onnx"):
        assert "replace config.json in" in shell.fails(first, model, out, *options)
        assert files(project) == before
    shell.ok(first, model, project / "small.onnx", *options, "--overwrite")
    assert (project / "config.json").read_bytes() == model.with_name("config.json").read_bytes()
    shell.ok(first, model, project / "small.onnx", *options)  # its own now


def test_a_folder_that_was_named_keeps_its_own_model(shell: Shell, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model.parent, other)  # the same companions, so that only the model is in question
    before = files(other)
    message = shell.fails("quantize", model, other, *W8)
    assert str(other) in message
    assert "model.onnx" in message
    assert files(other) == before
    shell.ok("quantize", model, other, *W8, "--overwrite")
    shell.ok("quantize", model, other, *W8)  # its own by now
    shutil.copy(model, other / "named.onnx")
    shell.ok("quantize", model, other / "named.onnx", *W8)
    assert "would overwrite the input" in shell.fails("quantize", model, model.parent, *W8)


def test_what_an_earlier_run_wrote_besides_does_not_stay(
    shell: Shell, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, a prefix and scales of another model: each as long as nobody changed it or may need it."""
    out, source = tmp_path / "out", exports.genai_like()
    names = ["model.onnx.data", "prefix.npz", "model.kv_scales.json"]
    monkeypatch.setattr(model_io, "_EXTERNAL_FROM", 1)
    cached = ("--w-bits", 16, "--kv-bits", 8, "--no-check", "--calib-samples", 1, "--calib-seq-len", 16)
    shell.ok("quantize", source, out, *cached)
    shell.ok("quantize", source, tmp_path / "led", *W8, "--prefix", "npz", "--prefix-ids", "7,3")
    written = files(out) | files(tmp_path / "led")
    assert set(names) < set(written)
    monkeypatch.undo()

    def again(*prepared: str) -> set[str]:
        folder = tmp_path / "again"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(out, folder)
        for name in prepared:
            (folder / name).write_bytes(b"of somebody else")
        shell.ok("quantize", source, folder, *W8)
        return {path.name for path in folder.iterdir()} & {*names, *prepared}

    assert again() == set()
    assert again("model.kv_scales.json") == {"model.kv_scales.json"}
    assert again("other.onnx") == {"other.onnx", "model.kv_scales.json"}
    shell.ok("quantize", source, tmp_path / "led", *W8)
    assert not (tmp_path / "led" / "prefix.npz").exists()
    assert (tmp_path / "led" / "tokenizer.json").exists()


def test_an_output_that_fails_leaves_what_was_there(
    shell: Shell, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(model_io, "_EXTERNAL_FROM", 1)
    shell.ok("quantize", model, out, *W8)
    monkeypatch.undo()
    before, move = files(out), Path.replace

    def failing(path: Path, target: Path) -> Path:
        if path.name == "model.onnx.data":
            raise OSError("no")
        return move(path, target)

    monkeypatch.setattr(Path, "replace", failing)
    assert "cannot write" in shell.fails("quantize", model, out, *W8, "--no-check")
    monkeypatch.undo()
    assert files(out) == before


def test_an_existing_rotation_config_is_replaced_only_when_asked(shell: Shell, model: Path, tmp_path: Path) -> None:
    config = tmp_path / "places.json"
    shell.ok("inspect", model, "--write-config", config)
    shell.ok("inspect", model, "--write-config", config)  # the same content
    written = config.read_bytes()
    config.write_text("edited by hand")
    assert str(config) in shell.fails("inspect", model, "--write-config", config)
    assert config.read_text() == "edited by hand"
    shell.ok("inspect", model, "--write-config", config, "--overwrite")
    assert config.read_bytes() == written


@pytest.mark.parametrize("file", ["results.json", "calibration.txt", "w8/model.onnx"])
def test_a_demo_leaves_other_folders_alone(file: str, shell: Shell, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text('{"rows": "mine"}')
    before = files(tmp_path)
    message = shell.fails("demo", "--out", tmp_path)
    assert str(tmp_path) in message
    assert file.split("/", maxsplit=1)[0] in message
    assert files(tmp_path) == before


def test_an_export_spares_folders(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("an earlier export")
    (tmp_path / "int8").mkdir()
    assert "--overwrite" in shell.fails("export", exports.hf_folder("llama"), tmp_path)
    assert "int8" in shell.fails("export", exports.hf_folder("llama"), tmp_path, "--overwrite")
    assert set(files(tmp_path)) == {"model.onnx", "int8"}


@pytest.mark.parametrize(
    "command",
    [
        ("quantize", "MODEL", "/proc/nope/", *W8),
        ("quantize", "MODEL", "/proc/nope/", "--w-bits", "4", "--weights", "rtn"),
        ("rotate", "MODEL", "/proc/nope/", "--no-verify"),
        ("inspect", "MODEL", "--write-config", "/proc/nope/c.json"),
        ("export", "FOLDER", "/proc/nope/"),
    ],
)
def test_refusals_name_the_path_that_was_typed(command: tuple[str, ...], shell: Shell, model: Path) -> None:
    given = {"MODEL": str(model), "FOLDER": str(exports.hf_folder("llama"))}
    assert "/proc/nope" in shell.fails(*(given.get(word, word) for word in command))


def test_a_relative_path_is_named_as_it_was_typed(shell: Shell, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/proc")
    assert "nope/out.onnx" in shell.fails("quantize", model, "nope/out.onnx", *W8)
