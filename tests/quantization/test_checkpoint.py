"""The folder that outlives a killed run: what is in it, and when it goes."""

from pathlib import Path

import numpy as np
import pytest
import rounded_weights

from quarot_onnx.errors import ConfigError, OutputError, VerificationError
from quarot_onnx.quantization.checkpoint import Checkpoint, notes_of, open_checkpoint
from quarot_onnx.quantization.weights.scheme import WeightScheme

SCHEME = WeightScheme(4)
WEIGHT = rounded_weights.quantized((6, 5), SCHEME)
RUN = {"config": {"bits": 4}, "files": [["a", 1, 2]]}


def save(folder: Path) -> None:
    (folder / "states").write_text("hidden")


def begin_and_fail(target: Path, error: BaseException, blocks: int = 1) -> None:
    """A run that begins a block, or none, and then ends so."""
    with open_checkpoint(target, RUN) as checkpoint:
        for block in range(blocks):
            checkpoint.begin_block(block + 1, [], save)
        raise error


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_weights_come_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "q.onnx")
    name = "/model/layers.0/" + "x" * 400  # longer than a file name may be
    put = checkpoint.store.put(name, WEIGHT)
    found = Checkpoint(tmp_path / "q.onnx").store.find(name, SCHEME, (6, 5))
    assert found is not None
    for weight in (put.load(), found.load()):
        np.testing.assert_array_equal(weight.integers, WEIGHT.integers)
        np.testing.assert_array_equal(weight.scale, WEIGHT.scale)
        np.testing.assert_array_equal(weight.zero_point, WEIGHT.zero_point)
    assert checkpoint.store.find("other", SCHEME, (6, 5)) is None
    with pytest.raises(FileNotFoundError, match="'other' is missing"):
        checkpoint.store.require("other", SCHEME, (6, 5))


def test_a_weight_that_is_not_whole_is_none(tmp_path: Path) -> None:
    store = Checkpoint(tmp_path / "q.onnx").store
    store.put("w", WEIGHT)
    path = next((tmp_path / ".q.onnx.quarot" / "weights").iterdir())
    content = path.read_bytes()
    for stop in (0, 10, len(content) - 30):
        path.write_bytes(content[:stop])
        assert store.find("w", SCHEME, (6, 5)) is None
    path.write_bytes(content)
    assert store.find("w", SCHEME, (6, 5)) is not None


def test_only_the_last_block_is_kept(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "q.onnx")
    assert checkpoint.last_block() is None
    for block in (1, 2, 11):
        checkpoint.begin_block(block, ["a note"] * block, save)
        found = checkpoint.last_block()
        assert found is not None
        assert found[0] == block
        assert notes_of(found[1]) == ["a note"] * block
        assert (found[1] / "states").read_text() == "hidden"
    assert names(checkpoint.folder) == {"weights", "scratch", "block-11"}


def test_a_block_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "q.onnx")
    checkpoint.begin_block(1, [], save)

    def fails(folder: Path) -> None:
        save(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"state of block 2 in .*: No space left on device; free some space"):
        checkpoint.begin_block(2, [], fails)
    found = checkpoint.last_block()
    assert found is not None
    assert found[0] == 1
    checkpoint.begin_block(2, [], save)
    assert names(checkpoint.folder) == {"weights", "scratch", "block-2"}


def test_the_same_run_goes_on_and_another_does_not(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "q.onnx")
    assert not checkpoint.resume(RUN)
    checkpoint.store.put("w", WEIGHT)
    checkpoint.begin_block(1, [], save)
    again = Checkpoint(tmp_path / "q.onnx")
    assert again.resume(dict(reversed(RUN.items())))
    assert again.last_block() is not None
    assert again.store.find("w", SCHEME, (6, 5)) is not None
    assert not again.resume(RUN | {"samples": "other"})
    assert again.last_block() is None
    assert again.store.find("w", SCHEME, (6, 5)) is None
    again.store.put("w", WEIGHT)


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b'{"config": {"bi'])
def test_a_damaged_description_is_another_run(damage: bytes, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "q.onnx")
    checkpoint.resume(RUN)
    checkpoint.begin_block(1, [], save)
    (checkpoint.folder / "run.json").write_bytes(damage)
    assert not checkpoint.resume(RUN)
    assert checkpoint.last_block() is None
    assert checkpoint.resume(RUN)


def test_scratch_is_new_in_every_run(tmp_path: Path) -> None:
    (Checkpoint(tmp_path / "q.onnx").scratch / "rotated.onnx").write_text("old")
    assert not list(Checkpoint(tmp_path / "q.onnx").scratch.iterdir())


def test_a_run_that_ends_well_leaves_nothing(tmp_path: Path) -> None:
    with open_checkpoint(tmp_path / "new" / "q.onnx", RUN) as checkpoint:
        checkpoint.begin_block(1, [], save)
        assert names(tmp_path) == {".new.q.onnx.quarot"}, "the output's folder is made with the output"
    assert not list(tmp_path.iterdir())


def test_outputs_of_one_name_in_new_folders_do_not_meet(tmp_path: Path) -> None:
    with open_checkpoint(tmp_path / "a" / "q.onnx", RUN) as one, open_checkpoint(tmp_path / "b" / "q.onnx", RUN) as two:
        assert one.folder != two.folder


def test_two_runs_to_one_output_are_refused(tmp_path: Path) -> None:
    with (
        open_checkpoint(tmp_path / "q.onnx", RUN) as checkpoint,
        pytest.raises(OutputError, match=r"another run is writing .*q\.onnx; wait for it, or choose another output"),
        open_checkpoint(tmp_path / "q.onnx", RUN),
    ):
        pass
    assert not checkpoint.folder.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, OutputError, ZeroDivisionError])
@pytest.mark.parametrize("begun", [False, True])
def test_what_stops_a_run_from_outside(begun: bool, error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error) as raised:
        begin_and_fail(tmp_path / "q.onnx", error(), int(begun))
    notes = getattr(raised.value, "__notes__", [])
    if not begun:
        assert not notes
        assert not list(tmp_path.iterdir())
        return
    folder = tmp_path / ".q.onnx.quarot"
    assert notes == [f"finished blocks are kept in {folder}: the same command goes on from there"]
    assert names(folder) == {"run.json", "weights", "block-1", "lock"}


@pytest.mark.parametrize("error", [ConfigError, VerificationError])
def test_what_would_only_fail_again_is_forgotten(error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error) as raised:
        begin_and_fail(tmp_path / "q.onnx", error())
    assert not getattr(raised.value, "__notes__", [])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_anywhere_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no space is left in .*: free some, and run the same command again"):
        begin_and_fail(tmp_path / "q.onnx", OSError(28, "No space left on device"))
    assert names(tmp_path / ".q.onnx.quarot") == {"run.json", "weights", "block-1", "lock"}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / ".q.onnx.quarot").write_text("a file in the way")
    with pytest.raises(OutputError, match="choose another output folder"):
        Checkpoint(tmp_path / "q.onnx")
