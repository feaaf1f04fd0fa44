"""What outlives a killed run, and when it goes."""

from pathlib import Path

import numpy as np
import pytest
import rounded_weights

from quarot_onnx.errors import ClusterError, ConfigError, OutputError, VerificationError
from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.rounding.checkpoint import DAMAGE, Checkpoint, notes_of, open_checkpoint

SCHEME = WeightScheme(4)
WEIGHT = rounded_weights.quantized((6, 5), SCHEME)
RUN = {"config": {"bits": 4}, "files": [["a", 1, 2]]}


def save(folder: Path) -> None:
    (folder / "states").write_text("hidden")


def begin_and_fail(folder: Path, error: BaseException, blocks: int = 1) -> None:
    """A run that begins a block, or none, and then ends so."""
    with open_checkpoint(folder, RUN) as checkpoint:
        for block in range(blocks):
            checkpoint.begin_block(block + 1, [], save)
        raise error


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_weights_come_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    name = "/model/layers.0/" + "x" * 400  # longer than a file name may be
    put = checkpoint.store.put(name, WEIGHT)
    found = Checkpoint(tmp_path).store.find(name, SCHEME, (6, 5))
    assert found is not None
    for weight in (put.load(), found.load()):
        np.testing.assert_array_equal(weight.integers, WEIGHT.integers)
        np.testing.assert_array_equal(weight.scale, WEIGHT.scale)
        np.testing.assert_array_equal(weight.zero_point, WEIGHT.zero_point)
    assert checkpoint.store.find("other", SCHEME, (6, 5)) is None
    with pytest.raises(FileNotFoundError, match="'other' is missing"):
        checkpoint.store.require("other", SCHEME, (6, 5))


def test_a_weight_that_is_not_whole_is_none(tmp_path: Path) -> None:
    store = Checkpoint(tmp_path).store
    store.put("w", WEIGHT)
    path = next((tmp_path / "weights").iterdir())
    content = path.read_bytes()
    for stop in (0, 10, len(content) - 30):
        path.write_bytes(content[:stop])
        assert store.find("w", SCHEME, (6, 5)) is None
    for flipped in range(0, len(content) // 3, 40):
        path.write_bytes(content[:flipped] + bytes([content[flipped] ^ 255]) + content[flipped + 1 :])
        found = store.find("w", SCHEME, (6, 5))
        assert found is None or np.array_equal(found.load().integers, WEIGHT.integers), "in a header that says nothing"
    path.write_bytes(content)
    assert store.find("w", SCHEME, (6, 5)) is not None


def test_only_the_last_block_is_kept(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.last_block() is None
    for block in (1, 2, 11):
        checkpoint.begin_block(block, ["a note"] * block, save)
        found = checkpoint.last_block()
        assert found is not None
        assert found[0] == block
        assert notes_of(found[1]) == ["a note"] * block
        assert (found[1] / "states").read_text() == "hidden"
    assert names(checkpoint.folder) == {"weights", "block-11"}


def test_a_block_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
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
    assert names(checkpoint.folder) == {"weights", "block-2"}


def test_the_same_run_goes_on_and_another_does_not(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    assert not checkpoint.resume(RUN)
    checkpoint.store.put("w", WEIGHT)
    checkpoint.begin_block(1, [], save)
    again = Checkpoint(tmp_path)
    assert again.resume(dict(reversed(RUN.items())))
    assert again.last_block() is not None
    assert again.store.find("w", SCHEME, (6, 5)) is not None
    assert not again.resume(RUN | {"samples": "other"})
    assert again.last_block() is None
    assert again.store.find("w", SCHEME, (6, 5)) is None
    again.store.put("w", WEIGHT)


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b'{"config": {"bi'])
def test_a_damaged_description_is_another_run(damage: bytes, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.resume(RUN)
    checkpoint.begin_block(1, [], save)
    (checkpoint.folder / "run.json").write_bytes(damage)
    assert not checkpoint.resume(RUN)
    assert checkpoint.last_block() is None
    assert checkpoint.resume(RUN)


def test_a_run_that_ends_well_leaves_nothing(tmp_path: Path) -> None:
    with open_checkpoint(tmp_path, RUN) as checkpoint:
        checkpoint.begin_block(1, [], save)
        assert names(tmp_path) == {"run.json", "weights", "block-1"}
    assert not list(tmp_path.iterdir())


def test_other_things_there_are_no_blocks(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    for name in ("block-old", "block-", "block-1.bak"):
        (tmp_path / name).mkdir()
    assert checkpoint.last_block() is None


@pytest.mark.parametrize("damage", ["", "{not json", "5", "[1, 2]", '{"a": "b"}'])
def test_damaged_notes_are_seen(damage: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.begin_block(1, ["a note"], save)
    (tmp_path / "block-1" / "notes.json").write_text(damage)
    with pytest.raises(DAMAGE):
        notes_of(tmp_path / "block-1")


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, MemoryError, OutputError, ClusterError, ZeroDivisionError]
)
@pytest.mark.parametrize("begun", [False, True])
def test_what_stops_a_run_from_outside(begun: bool, error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error) as raised:
        begin_and_fail(tmp_path, error(), int(begun))
    notes = getattr(raised.value, "__notes__", [])
    if not begun:
        assert not notes
        assert not list(tmp_path.iterdir())
        return
    assert notes == [f"finished blocks are kept in {tmp_path}: the same command goes on from there"]
    assert names(tmp_path) == {"run.json", "weights", "block-1"}


@pytest.mark.parametrize("error", [ConfigError, VerificationError])
def test_what_would_only_fail_again_is_forgotten(error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error) as raised:
        begin_and_fail(tmp_path, error())
    assert not getattr(raised.value, "__notes__", [])
    assert not list(tmp_path.iterdir())
