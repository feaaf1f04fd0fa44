"""A run that rounds block by block, killed and taken up again: the same bytes, less work, nothing left behind."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import pytest
from lowbit_runs import config_for, text_reader, watched
from onnx import numpy_helper

from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.errors import ModelError, OutputError
from quarot_onnx.pipeline import Outcome, quantize
from quarot_onnx.rounding.store import WeightStore
from quarot_onnx.stages.runner import StageRunner

LAYERS, PER_LAYER = 3, 5
"""genai_like packs q, k and v: five Linears in four stages; with the head 16 weights."""

CONFIG = config_for("gptaq", "w4a8", quarot=QuarotConfig(), use_external_data_format=True)


class StoppedError(Exception):
    """What stops a run from outside."""


def stop_at(count: int, error: type[BaseException] = KeyboardInterrupt) -> Any:
    """Progress that ends the run when so many weights are rounded."""

    def progress(phase: str, done: int, _total: int | None) -> None:
        if (phase, done) == ("round", count):
            raise error

    return progress


@pytest.fixture(scope="module")
def source() -> Path:
    return exports.genai_like(layers=LAYERS)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run(source, folder)
    return files(folder)


def run(source: Path, folder: Path, config: QConfig = CONFIG, **options: Any) -> Outcome:
    samples = options.pop("samples", 4)
    return quantize(source, folder / "q.onnx", config, text_reader(source, samples), verify=False, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.iterdir()}


def kept(folder: Path) -> set[str]:
    return {path.name for path in (folder / ".q.onnx.quarot").iterdir()} - {"lock"}


def interrupted(source: Path, folder: Path, count: int) -> list[str]:
    """Stop a run; gives the notes on the exception."""
    with pytest.raises(KeyboardInterrupt) as raised:
        run(source, folder, progress=stop_at(count))
    return getattr(raised.value, "__notes__", [])


def rounded_again(calls: Iterable[str]) -> int:
    return sum(len(call.split(" + ")) for call in calls)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_stopped_three_times_at_random(
    seed: int, source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = sorted(np.random.default_rng(seed).choice(np.arange(PER_LAYER + 1, 16), 3, replace=False).tolist())
    for count in counts:
        with watched(monkeypatch) as seen:
            notes = interrupted(source, tmp_path, count)
        assert len(notes) == 1
        assert "the same command goes on from there" in notes[0]
        assert str(tmp_path / ".q.onnx.quarot") in notes[0]
        blocks = (count - 1) // PER_LAYER
        assert kept(tmp_path) == {"run.json", "weights", f"block-{blocks}"}
        assert not (tmp_path / "q.onnx").exists()
    with watched(monkeypatch) as seen:
        run(source, tmp_path)
    assert rounded_again(seen.calls) == 16 - blocks * PER_LAYER
    assert files(tmp_path) == expected


def test_blocks_where_v_cannot_be_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-NeoX mixes Q, K and V within heads; its blocks begin at O."""
    source, config = exports.optimum_export("gpt_neox"), config_for("gptaq", "w4a8", use_external_data_format=True)
    linears = 8
    run(source, tmp_path / "whole", config)
    with pytest.raises(StoppedError):
        run(source, tmp_path / "again", config, progress=stop_at(linears, StoppedError))
    with watched(monkeypatch) as seen:
        run(source, tmp_path / "again", config)
    assert rounded_again(seen.calls) <= linears // 2 + 1, "two blocks of four, and the head"
    assert files(tmp_path / "again") == files(tmp_path / "whole")


def test_stopped_before_a_block_is_done_nothing_is_kept(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    assert interrupted(source, tmp_path / "new", 4) == []
    assert not list(tmp_path.iterdir())
    run(source, tmp_path)
    assert files(tmp_path) == expected


def test_stopped_after_the_last_block(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks are taken as they are; what is rounded plainly, is when it is written."""
    for phase in ("quantize", "save"):

        def progress(name: str, _done: int, _total: int | None, phase: str = phase) -> None:
            if name == phase:
                raise StoppedError

        with pytest.raises(StoppedError):
            run(source, tmp_path, progress=progress)
    with watched(monkeypatch) as seen:
        run(source, tmp_path)
    assert seen.calls == seen.plain
    assert len(seen.plain) == 1
    assert files(tmp_path) == expected


PROGRAM = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from lowbit_runs import config_for, text_reader
from quarot_onnx.pipeline import quantize
from quarot_onnx.config.algorithm import QuarotConfig
def progress(phase, done, total):
    if (phase, done) == ("round", 12):
        os.kill(os.getpid(), signal.SIGKILL)
source = Path({source!r})
config = config_for("gptaq", "w4a8", quarot=QuarotConfig(), use_external_data_format=True)
quantize(source, {target!r}, config, text_reader(source), verify=False, progress=progress)
"""


def test_killed(source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in the third block, of a process that cannot clean up."""
    code = PROGRAM.format(
        tests=str(Path(__file__).parents[1] / "support"), source=str(source), target=str(tmp_path / "q.onnx")
    )
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert kept(tmp_path) == {"run.json", "weights", "block-2", "scratch"}
    with watched(monkeypatch) as seen:
        run(source, tmp_path)
    assert rounded_again(seen.calls) == 6
    assert files(tmp_path) == expected


@pytest.mark.parametrize("change", ["method", "samples", "source", "rotation"])
def test_another_task_starts_over(change: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its result is that of a run that found nothing."""
    mine = tmp_path / "source" / "model.onnx"
    shutil.copytree(source.parent, mine.parent)
    options: dict[str, Any] = {}
    folder, fresh = tmp_path / "a", tmp_path / "b"
    folder.mkdir()
    interrupted(mine, folder, 12)
    if change == "method":
        options["config"] = config_for("gptq", "w4a8", quarot=QuarotConfig(), use_external_data_format=True)
    elif change == "samples":
        options["samples"] = 3
    elif change == "rotation":
        quarot = QuarotConfig(use_random_had=True, seed=9)
        options["config"] = config_for("gptaq", "w4a8", quarot=quarot, use_external_data_format=True)
    else:
        # Other weights, in files of the same size.
        for path in exports.genai_like(layers=LAYERS).parent.glob("model.onnx*"):
            (mine.parent / path.name).write_bytes(path.read_bytes())
        spoil(mine)
    with watched(monkeypatch) as seen:
        run(mine, folder, **options)
    assert rounded_again(seen.calls) == 16
    run(mine, fresh, **options)
    assert files(folder) == files(fresh)


def spoil(path: Path) -> None:
    """Another number in the embedding, and with it all over the model."""
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    array = numpy_helper.to_array(largest).copy()
    array[0] = array[0, ::-1]
    largest.raw_data = array.tobytes()
    location = f"{path.name}.data"
    (path.parent / location).unlink()
    onnx.save(model, path, save_as_external_data=True, location=location)


def test_a_changed_rotation_matrix_starts_over(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration names the same file, which holds something else."""
    matrix, folder = tmp_path / "r.npy", tmp_path / "a"
    config = config_for("gptaq", "w4a8", quarot=QuarotConfig(r1_matrix_path=matrix))
    folder.mkdir()
    np.save(matrix, np.eye(64)[::-1])
    with pytest.raises(StoppedError):
        run(source, folder, config, progress=stop_at(12, StoppedError))
    np.save(matrix, np.eye(64))
    with watched(monkeypatch) as seen:
        run(source, folder, config)
    assert rounded_again(seen.calls) == 16


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


DAMAGES = {
    "a byte of every weight": lambda folder: [flip(path) for path in (folder / "weights").glob("*.npz")],
    "a weight": lambda folder: truncate(next((folder / "weights").glob("*.npz"))),
    "all weights": lambda folder: [path.unlink() for path in (folder / "weights").iterdir()],
    "hidden states": lambda folder: truncate(folder / "block-2" / "quantized.zip"),
    "notes": lambda folder: truncate(folder / "block-2" / "notes.json"),
    "no notes": lambda folder: (folder / "block-2" / "notes.json").unlink(),
    "no hidden states": lambda folder: (folder / "block-2" / "float.zip").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_not_trusted(
    damage: str, source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a power cut may leave them: all blocks are done anew, and the outcome says so."""
    interrupted(source, tmp_path, 12)
    DAMAGES[damage](tmp_path / ".q.onnx.quarot")
    with watched(monkeypatch) as seen:
        done = run(source, tmp_path)
    assert any("damaged: all blocks were done anew" in note for note in done.notes)
    assert rounded_again(seen.calls) == 16
    assert files(tmp_path) == expected


def test_what_was_begun_and_not_finished_does_no_harm(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(source, tmp_path, 12)
    folder = tmp_path / ".q.onnx.quarot"
    (folder / "partial").mkdir()
    (folder / "partial" / "quantized.zip").write_bytes(b"PK")
    (folder / "weights" / "0123.partial").write_bytes(b"PK")
    (folder / "scratch").mkdir()
    (folder / "scratch" / "rotated.onnx").write_bytes(b"junk")
    with watched(monkeypatch) as seen:
        done = run(source, tmp_path)
    assert not done.notes
    assert rounded_again(seen.calls) == 6
    assert files(tmp_path) == expected


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_what_is_done(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saves = StageRunner.save, []

    def second_fails(runner: StageRunner, folder: Path) -> None:
        saves.append(folder)
        if len(saves) == 2:
            (folder / "quantized.zip").write_bytes(b"PK")
            full()
        save(runner, folder)

    with monkeypatch.context() as patch:
        patch.setattr(StageRunner, "save", second_fails)
        with pytest.raises(
            OutputError, match=r"state of block 2 in .*No space left.*free some space, and run the same"
        ):
            run(source, tmp_path)
    assert kept(tmp_path) >= {"run.json", "weights", "block-1"}
    put, puts = WeightStore.put, []

    def later_fails(store: WeightStore, *rest: Any) -> Any:
        puts.append(rest[0])
        return full() if len(puts) == 3 else put(store, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(WeightStore, "put", later_fails)
        with pytest.raises(OutputError, match=r"no space is left in .*free some, and run the same command again"):
            run(source, tmp_path)
    assert kept(tmp_path) >= {"run.json", "weights", "block-1"}
    with watched(monkeypatch) as seen:
        run(source, tmp_path)
    assert rounded_again(seen.calls) == 11
    assert files(tmp_path) == expected


def test_an_error_of_the_input_forgets_all(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command would only fail again: nothing is worth keeping."""
    original, puts = WeightStore.put, list[str]()

    def refuse(store: WeightStore, name: str, weight: Any) -> Any:
        puts.append(name)
        if len(puts) == LAYERS * PER_LAYER:
            raise ModelError("the weight holds NaN")
        return original(store, name, weight)

    monkeypatch.setattr(WeightStore, "put", refuse)
    with pytest.raises(ModelError) as raised:
        run(source, tmp_path)
    assert not getattr(raised.value, "__notes__", [])
    assert not list(tmp_path.iterdir())
