"""Outputs appear at once or not at all, and never replace an input."""

import errno
import os
import shutil
from pathlib import Path

import io_models
import numpy as np
import onnx_ir as ir
import pytest

from quarot_onnx.errors import OutputError
from quarot_onnx.io import layout, model_io, staging


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in").mkdir()
    return io_models.write(io_models.linear_model(), tmp_path / "in" / "m.onnx", data="weights.bin")


def refusal(model: ir.Model, path: Path, **options) -> str:
    with pytest.raises(OutputError) as caught:
        model_io.save(model, path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["m.onnx", "weights.bin", "soft", "hard", "../in/m.onnx", "other/../m.onnx"])
def test_inputs_are_never_targets(source, name):
    folder = source.parent
    (folder / "other").mkdir()
    (folder / "soft").symlink_to(source)
    (folder / "hard").hardlink_to(folder / "weights.bin")
    before = io_models.tree(folder)
    assert "would overwrite the input" in refusal(model_io.load(source), folder / name)
    assert io_models.tree(folder) == before


def test_the_data_file_of_an_output_is_checked_too(tmp_path):
    source = io_models.write(io_models.linear_model(), tmp_path / "m.onnx", data="n.onnx.data")
    message = refusal(model_io.load(source), tmp_path / "n.onnx", use_external_data=True)
    assert f"{tmp_path / 'n.onnx.data'} would overwrite the input" in message


def test_inputs_stay_protected_when_every_weight_is_rewritten(source):
    model = model_io.load(source)
    for value in model.graph.initializers.values():
        array = model_io.read_array(value.const_value)
        value.const_value = ir.Tensor(array)
    assert "would overwrite the input" in refusal(model, source.with_name("weights.bin"))


def test_files_that_borrowed_tensors_are_read_from_are_protected(source, tmp_path):
    other = io_models.write(io_models.linear_model(io_models.weights(7)), tmp_path / "other.onnx")
    model = model_io.load(source)
    model.graph.initializers["first"].const_value = model_io.load(other).graph.initializers["first"].const_value
    assert f"would overwrite the input {other}" in refusal(model, other)


def test_forbidden_files_and_folders_are_refused(source, tmp_path):
    model = model_io.load(source)
    kept = tmp_path / "tokens.npz"
    kept.write_bytes(b"x")
    assert f"would overwrite the input {kept}" in refusal(model, kept, forbid=[kept])
    assert "is a folder; name a file in it" in refusal(model, tmp_path)
    assert f"{kept} is a file, not a folder" in refusal(model, kept / "out.onnx")
    assert f"{kept} is a file, not a folder" in refusal(model, kept / "deep" / "out.onnx")
    assert "exists and overwriting is off" in refusal(model, kept, overwrite=False)


def test_a_folder_without_write_permission_is_refused(source, tmp_path, monkeypatch):
    # The tests may run as root, whom no permission bit stops.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    message = refusal(model_io.load(source), tmp_path / "new" / "out.onnx")
    assert f"no permission to write in {tmp_path}" in message


def test_too_little_space_is_told_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 999, 999))
    before = io_models.tree(tmp_path)
    message = refusal(model_io.load(source), tmp_path / "new" / "out.onnx")
    assert "999 free" in message
    assert io_models.tree(tmp_path) == before


def test_a_single_file_beyond_2_gb_is_refused(tmp_path, source):
    model = model_io.load(source)
    huge = model_io.lazy_tensor(lambda: np.empty(0), dtype=ir.DataType.FLOAT, shape=[1 << 15, 1 << 15], name="first")
    model.graph.initializers["first"].const_value = huge
    message = refusal(model, tmp_path / "out.onnx", use_external_data=False)
    assert "at most 2,147,483,647; use external data" in message


def failing(model: ir.Model, error: BaseException) -> None:
    """Make the second weight raise when it is evaluated."""
    value = model.graph.initializers["second"]

    def compute() -> np.ndarray:
        raise error

    value.const_value = model_io.lazy_tensor(compute, dtype=ir.DataType.FLOAT, shape=[32, 32], name="second")


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), AssertionError("ours"), MemoryError()])
def test_any_interruption_leaves_no_trace(source, tmp_path, error, external):
    model = model_io.load(source)
    failing(model, error)
    (tmp_path / "out.onnx").write_bytes(b"earlier model")
    (tmp_path / "out.onnx.data").write_bytes(b"earlier data")
    before = io_models.tree(tmp_path)
    for target in (tmp_path / "out.onnx", tmp_path / "new" / "deep" / "out.onnx"):
        with pytest.raises(type(error)):
            model_io.save(model, target, use_external_data=external, report={})
        assert io_models.tree(tmp_path) == before


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "; free some space, or choose another folder"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "; raise the limit on the size of files (ulimit -f) or the"),
        (OSError("16896 requested and 2283 written"), "; raise the limit on the size of files (ulimit -f) or the"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), " free)"),
    ],
    ids=str,
)
def test_a_disk_that_fills_up_is_an_output_error(error, way_out, source, tmp_path, monkeypatch):
    def full(file, tensor):
        file.write(b"some bytes")
        raise error

    monkeypatch.setattr(layout, "_write_tensor", full)
    before = io_models.tree(tmp_path)
    message = refusal(model_io.load(source), tmp_path / "new" / "out.onnx", use_external_data=True)
    assert str(error) in message
    assert "bytes needed" in message
    assert way_out in message
    assert io_models.tree(tmp_path) == before


@pytest.mark.parametrize("failing_move", range(5))
@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()])
def test_a_failure_while_moving_restores_the_earlier_files(source, tmp_path, monkeypatch, failing_move, error):
    for name in ("out.onnx", "out.onnx.data"):
        (tmp_path / name).write_text(f"earlier {name}")
    before = io_models.tree(tmp_path)
    moves = []
    replace = Path.replace

    def counted(self, target):
        moves.append(target)
        if len(moves) == failing_move + 1:
            raise error
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", counted)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        model_io.save(model_io.load(source), tmp_path / "out.onnx", use_external_data=True, report={})
    assert len(moves) > failing_move
    assert io_models.tree(tmp_path) == before


def test_earlier_files_are_replaced_and_nothing_else_is_left(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "out.onnx").write_bytes(b"earlier model")
    (tmp_path / "out" / "mine.txt").write_text("mine")
    saved = model_io.save(model_io.load(source), tmp_path / "out" / "out.onnx", use_external_data=True, report={})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "mine.txt",
        "out.onnx",
        "out.onnx.data",
        "out.quarot.json",
    ]
    assert model_io.load(saved.path)


def test_a_report_that_is_not_json_fails_before_anything_is_written(source, tmp_path):
    before = io_models.tree(tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        model_io.save(model_io.load(source), tmp_path / "new" / "out.onnx", report={"x": object()})
    assert io_models.tree(tmp_path) == before


def test_batches_of_nothing_are_fine(tmp_path):
    with staging.staged(tmp_path / "a" / "b" / "m.onnx"):
        pass
    assert io_models.tree(tmp_path) == {"a": "folder", "a/b": "folder"}
