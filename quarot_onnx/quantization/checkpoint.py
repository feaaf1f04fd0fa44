"""What a run that rounds weights block by block keeps beside its output, so that a killed one can go on.

::

    .model.onnx.quarot/     (.new.model.onnx.quarot/ in the folder above, while the output folder "new" does not exist)
      run.json        what is being done: source, configuration, calibration data, versions
      weights/        a file for every rounded weight
      block-7/        the hidden states at the beginning of block 7, and notes.json
      scratch/        the rotated model, hidden states that do not fit into memory
      lock            held while a run is at work

Files and folders appear whole or not at all. A run that does something else starts over; a run that ends well removes
the folder.
"""

import errno
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from quarot_onnx.errors import OutputError, QuarotError
from quarot_onnx.quantization.weights.store import WeightStore
from quarot_onnx.staging import nearest_existing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_BLOCK, _NOTES = "block-", "notes.json"

_FULL = {errno.ENOSPC, errno.EDQUOT}

DAMAGE = (zipfile.BadZipFile, EOFError, ValueError, KeyError, FileNotFoundError)
"""What reading a file raises that is not whole, as a power cut leaves it."""


def notes_of(block: Path) -> list[str]:
    """What was noted before a block, from its folder; raises what ``DAMAGE`` lists where that is not whole."""
    notes = json.loads((block / _NOTES).read_text(encoding="utf-8"))
    if not isinstance(notes, list):
        raise ValueError(f"{block / _NOTES} holds no list")  # noqa: TRY004 - damage
    return notes


class Checkpoint:
    """The folder of one run."""

    def __init__(self, target: Path) -> None:
        """Use the folder that belongs to an output.

        Args:
            target: The .onnx file that will be written.

        Raises:
            OutputError: It cannot be made.
        """
        self.folder = _made(target)
        self._weights = self.folder / "weights"
        self._weights.mkdir(exist_ok=True)
        self.store = WeightStore(self._weights)
        self.scratch = self.folder / "scratch"
        """For what need not outlive the run."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()

    def resume(self, run: Mapping[str, object]) -> bool:
        """Take up an earlier run if it did the same, else start over.

        Args:
            run: What this run does, JSON types only.

        Returns:
            Whether there is an earlier run of the same kind.
        """
        file, text = self.folder / "run.json", json.dumps(run, sort_keys=True).encode()
        if file.is_file() and file.read_bytes() == text:
            return True
        self.forget_blocks()
        shutil.rmtree(self._weights, ignore_errors=True)
        self._weights.mkdir()
        file.write_bytes(text)
        return False

    def begin_block(self, block: int, notes: Sequence[str], save: Callable[[Path], None]) -> None:
        """Keep the state at the beginning of a block, in place of that of an earlier block.

        Args:
            block: Its number; all earlier blocks are done.
            notes: What was noted so far.
            save: Writes the hidden states into a folder.

        Raises:
            OutputError: The disk is full.
        """
        partial = self.folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        earlier = list(self.folder.glob(f"{_BLOCK}*"))
        try:
            partial.mkdir()
            save(partial)
            (partial / _NOTES).write_text(json.dumps(list(notes)), encoding="utf-8")
            partial.rename(self.folder / f"{_BLOCK}{block}")
        except OSError as error:
            raise OutputError(
                f"cannot keep the state of block {block} in {self.folder}: {error.strerror}; free some space, and run "
                "the same command again"
            ) from error
        for path in earlier:
            shutil.rmtree(path, ignore_errors=True)

    def last_block(self) -> tuple[int, Path] | None:
        """The block to go on with, and the folder of its notes and hidden states; None at the start."""
        found = {int(path.name.removeprefix(_BLOCK)): path for path in self.folder.glob(f"{_BLOCK}*")}
        if not found:
            return None
        block = max(found)
        return block, found[block]

    def forget_blocks(self) -> None:
        """Forget where to go on."""
        for path in self.folder.glob(f"{_BLOCK}*"):
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _made(target: Path) -> Path:
    """The folder that belongs to an output; made if it is not there.

    Raises:
        OutputError: It cannot be made.
    """
    target = target.absolute()
    beside = nearest_existing(target.parent)
    folder = beside / f".{'.'.join(target.relative_to(beside).parts)}.quarot"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {beside}: {error.strerror}; choose another output folder") from error
    return folder


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keep other runs away from an output's folder; without effect where the system has no such locks.

    Raises:
        OutputError: Another run has it.
    """
    if fcntl is None:
        yield
        return
    with (_made(target) / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another run is writing {target}; wait for it, or choose another output") from error
        yield


@contextmanager
def open_checkpoint(target: Path, run: Mapping[str, object]) -> Iterator[Checkpoint]:
    """The checkpoint of an output, removed when the run ends well or cannot be ended by running it again.

    What stops a run from outside (an interrupt, a full disk) leaves it, with a note on the exception.

    Args:
        target: The .onnx file that will be written.
        run: What this run does, JSON types only.

    Raises:
        OutputError: It cannot be made, another run has it, or the disk is full.
    """
    with _locked(target):
        checkpoint = Checkpoint(target)
        checkpoint.resume(run)
        try:
            yield checkpoint
        except BaseException as error:
            shutil.rmtree(checkpoint.scratch, ignore_errors=True)
            at_fault = isinstance(error, QuarotError) and not isinstance(error, OutputError)
            if at_fault or checkpoint.last_block() is None:
                checkpoint.remove()
            else:
                error.add_note(f"finished blocks are kept in {checkpoint.folder}: the same command goes on from there")
            if isinstance(error, OSError) and error.errno in _FULL:
                folder = checkpoint.folder.parent
                raise OutputError(f"no space is left in {folder}: free some, and run the same command again") from error
            raise
        checkpoint.remove()
