"""The hidden folder of a run: one for each output, locked, gone when nothing is kept."""

import errno
from pathlib import Path

import pytest

from quarot_onnx.errors import OutputError
from quarot_onnx.io.run_folder import run_folder
from quarot_onnx.run.workspace import scratch_folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def keep(target: Path) -> Path:
    """A run that leaves something for the next."""
    with run_folder(target) as folder:
        (folder.path / "kept").write_text("hidden")
    return folder.path


def test_it_lies_beside_the_output(tmp_path: Path) -> None:
    with run_folder(tmp_path / "q.onnx") as folder:
        assert folder.path == tmp_path / ".q.onnx.quarot"
        assert names(folder.path) == {"lock", "scratch"}
    assert not list(tmp_path.iterdir())


def test_the_folder_of_the_output_is_made_with_the_output(tmp_path: Path) -> None:
    with run_folder(tmp_path / "new" / "er" / "q.onnx"):
        assert names(tmp_path) == {".new.er.q.onnx.quarot"}
    assert not list(tmp_path.iterdir())


def test_outputs_of_one_name_in_new_folders_do_not_meet(tmp_path: Path) -> None:
    with run_folder(tmp_path / "a" / "q.onnx") as one, run_folder(tmp_path / "b" / "q.onnx") as two:
        assert one.path != two.path


def test_what_is_kept_is_found_when_the_folder_of_the_output_was_made_in_between(tmp_path: Path) -> None:
    kept = keep(tmp_path / "new" / "er" / "q.onnx")
    for made in (tmp_path / "new", tmp_path / "new" / "er"):
        made.mkdir()
        with run_folder(tmp_path / "new" / "er" / "q.onnx") as folder:
            assert folder.path == kept
            assert (folder.path / "kept").is_file()
    with scratch_folder(tmp_path / "new" / "er" / "q.onnx"):
        pass
    assert names(tmp_path) == {"new"}


def test_two_runs_to_one_output_are_refused(tmp_path: Path) -> None:
    with (
        run_folder(tmp_path / "q.onnx") as folder,
        pytest.raises(OutputError, match=r"another run is writing .*q\.onnx; wait for it, or choose another output"),
        run_folder(tmp_path / "q.onnx"),
    ):
        pass
    assert not folder.path.exists()


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network file systems are."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with run_folder(tmp_path / "q.onnx") as folder:
        assert folder.scratch.is_dir()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    """Its scratch, and the halves of files that it was about to move into place; those of other outputs stay."""
    left = [
        tmp_path / ".q.onnx.quarot" / "scratch",
        tmp_path / ".quarot-q.onnx-x1y2",
        tmp_path / ".quarot-other.onnx-x1",
        tmp_path / ".quarot-q.onnx-2.onnx-x1",
    ]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "rotated.onnx").write_text("old")
    with run_folder(tmp_path / "q.onnx") as folder:
        assert not list(folder.scratch.iterdir())
        assert names(tmp_path) == {".q.onnx.quarot", ".quarot-other.onnx-x1", ".quarot-q.onnx-2.onnx-x1"}
    assert names(tmp_path) == {".quarot-other.onnx-x1", ".quarot-q.onnx-2.onnx-x1"}


def test_an_output_that_is_there_needs_no_checkpoint(tmp_path: Path) -> None:
    """A run that keeps nothing, to the output of an interrupted one that did."""
    kept = keep(tmp_path / "q.onnx")
    (kept / "block-1").mkdir()
    with pytest.raises(ZeroDivisionError), scratch_folder(tmp_path / "q.onnx"):
        raise ZeroDivisionError
    assert names(kept) == {"lock", "kept", "block-1"}, "not yet written"
    with scratch_folder(tmp_path / "q.onnx"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_full_disk_anywhere_is_an_output_error(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"no space is left in .*: free some, and run the same command again"),
        run_folder(tmp_path / "q.onnx"),
    ):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spoilt", [".q.onnx.quarot", ".q.onnx.quarot/lock/a", ".q.onnx.quarot/scratch"])
def test_a_folder_that_cannot_be_used(spoilt: str, tmp_path: Path) -> None:
    path = tmp_path / spoilt
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file in the way")
    with pytest.raises(OutputError, match=r"choose another output"), run_folder(tmp_path / "q.onnx"):
        pass
