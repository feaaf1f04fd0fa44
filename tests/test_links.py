"""Links whose targets are gone are told of as such, whatever was to be read."""

import re
from collections.abc import Callable
from pathlib import Path

import exports
import io_models
import pytest
from command_line import Shell

from quarot_onnx import QConfig
from quarot_onnx.calibration.given import given_feeds, load_npz
from quarot_onnx.calibration.text_files import file_text
from quarot_onnx.calibration.tokenizer import tokenizer_file
from quarot_onnx.errors import CalibrationError, ConfigError, InputError, ModelError, OutputError
from quarot_onnx.export.export import export
from quarot_onnx.hadamard.dense import load_npy
from quarot_onnx.io import model_io


def told(link: Path, target: str = "gone") -> str:
    return rf"^{re.escape(str(link))} is a link to {target}, which is missing: put that there, or mend the link$"


@pytest.fixture
def link(tmp_path: Path) -> Path:
    found = tmp_path / "m.onnx"
    found.symlink_to("gone")
    return found


def test_a_model(link: Path, shell: Shell) -> None:
    with pytest.raises(ModelError, match=told(link)):
        model_io.load(link)
    assert re.search(told(link)[1:-1], shell.fails("inspect", link))
    assert re.search(told(link)[1:-1], shell.fails("export", link, link.with_name("out")))


def test_a_model_in_a_folder(link: Path, shell: Shell) -> None:
    folder = link.with_name("folder")
    folder.symlink_to("gone")
    with pytest.raises(ModelError, match=told(folder)):
        model_io.load(folder / "model.onnx")
    assert re.search(told(folder)[1:-1], shell.fails("inspect", folder))
    assert re.search(told(folder)[1:-1], shell.fails("inspect", folder / "model.onnx"))


def test_no_broken_link_is_meant(link: Path, shell: Shell) -> None:
    with pytest.raises(ModelError, match=r"no model file 'mm.onnx' in [^()]*$"):
        model_io.load(link.with_name("mm.onnx"))
    assert "did you mean" not in shell.fails("inspect", link.with_name("mm.onnx"))


def test_a_loop(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").symlink_to("b.onnx")
    (tmp_path / "b.onnx").symlink_to("a.onnx")
    with pytest.raises(ModelError, match=told(tmp_path / "a.onnx", "b.onnx")):
        model_io.load(tmp_path / "a.onnx")


def test_a_data_file(tmp_path: Path) -> None:
    path = io_models.write(io_models.linear_model(), tmp_path / "m.onnx", data="weights.bin")
    data = tmp_path / "weights.bin"
    data.unlink()
    data.symlink_to("gone")
    with pytest.raises(ModelError, match=told(data)):
        model_io.load(path)


def test_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.symlink_to("gone")
    for given in (path, tmp_path):
        with pytest.raises(CalibrationError, match=told(path)):
            tokenizer_file(given)


def test_a_folder_to_write_into(tmp_path: Path, shell: Shell) -> None:
    source = io_models.write(io_models.linear_model(), tmp_path / "m.onnx")
    out = tmp_path / "out"
    out.symlink_to("gone")
    with pytest.raises(OutputError, match=told(out)):
        model_io.check_target(model_io.load(source), out / "deep" / "out.onnx")
    for command in ("rotate", "quantize"):
        for inside in ("", "deeper", "out.onnx"):
            assert re.search(told(out)[1:-1], shell.fails(command, source, out / inside))
    assert re.search(told(out)[1:-1], shell.fails("inspect", source, "--write-config", out / "r.json"))
    with pytest.raises(OutputError, match=told(out)):
        export(exports.hf_folder("llama"), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "out"]


def test_a_file_of_the_models_name_in_a_folder_to_write_into(tmp_path: Path, shell: Shell) -> None:
    source, link = io_models.write(io_models.linear_model(), tmp_path / "m.onnx"), tmp_path / "out" / "m.onnx"
    link.parent.mkdir()
    link.symlink_to("gone")
    assert re.search(told(link)[1:-1], shell.fails("rotate", source, link.parent))
    assert link.is_symlink()


def test_a_file_to_write_that_was_named_is_replaced(link: Path) -> None:
    source = io_models.write(io_models.linear_model(), link.with_name("source.onnx"))
    assert model_io.save(model_io.load(source), link).path == link
    assert not link.is_symlink()
    assert not link.with_name("gone").exists()


def test_feeds(tmp_path: Path) -> None:
    path = tmp_path / "feeds.npz"
    path.symlink_to("gone")
    model = model_io.load(io_models.write(io_models.linear_model(), tmp_path / "m.onnx"))
    with pytest.raises(CalibrationError, match=told(path)):
        given_feeds(path, model)


@pytest.mark.parametrize(
    ("name", "read", "error"),
    [
        ("t.txt", file_text, CalibrationError),
        ("ids.npz", load_npz, CalibrationError),
        ("r1.npy", load_npy, ConfigError),
        ("recipe.yaml", QConfig.load, ConfigError),
        ("config.json", QConfig.load, ConfigError),
    ],
)
def test_what_is_read_beside_a_model(
    name: str, read: Callable[[Path], object], error: type[InputError], tmp_path: Path
) -> None:
    path = tmp_path / name
    with pytest.raises(error) as missing:
        read(path)
    assert "is a link" not in str(missing.value)
    path.symlink_to("gone")
    with pytest.raises(error, match=told(path)):
        read(path)
