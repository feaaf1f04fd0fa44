"""What a run that rounds weights block by block keeps in its folder, so that a killed one can go on.

::

    run.json        what is being done: source, configuration, calibration data, versions
    weights/        a file for every rounded weight
    block-7/        the hidden states at the beginning of block 7, and notes.json

Files and folders appear whole or not at all. A run that does something else starts over.
"""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from quarot_onnx.errors import ClusterError, OutputError, QuarotError
from quarot_onnx.rounding.store import WeightStore

_RUN, _WEIGHTS, _BLOCK, _NOTES = "run.json", "weights", "block-", "notes.json"

DAMAGE = (zipfile.BadZipFile, EOFError, ValueError, KeyError, FileNotFoundError)
"""What reading a file raises that is not whole, as a power cut leaves it."""


def notes_of(block: Path) -> list[str]:
    """What was noted before a block, from its folder; raises what ``DAMAGE`` lists where that is not whole."""
    notes = json.loads((block / _NOTES).read_text(encoding="utf-8"))
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise ValueError(f"{block / _NOTES} holds no list of texts")
    return notes


class Checkpoint:
    """The folder of one run."""

    def __init__(self, folder: Path) -> None:
        """Use a folder.

        Args:
            folder: The folder of the run, which exists.

        Raises:
            OSError: It cannot be written.
        """
        self.folder = folder
        self._weights = folder / _WEIGHTS
        self._weights.mkdir(exist_ok=True)
        self.store = WeightStore(self._weights)

    def resume(self, run: Mapping[str, object]) -> bool:
        """Take up an earlier run if it did the same, else start over.

        Args:
            run: What this run does, JSON types only.

        Returns:
            Whether there is an earlier run of the same kind.
        """
        file, text = self.folder / _RUN, json.dumps(run, sort_keys=True).encode()
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
        numbers = ((path.name.removeprefix(_BLOCK), path) for path in self.folder.glob(f"{_BLOCK}*"))
        found = {int(number): path for number, path in numbers if number.isdecimal()}
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
        self.forget_blocks()
        shutil.rmtree(self._weights, ignore_errors=True)
        (self.folder / _RUN).unlink(missing_ok=True)


@contextmanager
def open_checkpoint(folder: Path, run: Mapping[str, object]) -> Iterator[Checkpoint]:
    """A checkpoint, cleared when the run ends well or cannot be ended by running it again.

    What stops a run from outside (an interrupt, a full disk, a lost scheduler) leaves it, with a note on the exception.

    Args:
        folder: The folder of the run.
        run: What this run does, JSON types only.

    Raises:
        OSError: It cannot be written.
    """
    checkpoint = Checkpoint(folder)
    checkpoint.resume(run)
    try:
        yield checkpoint
    except BaseException as error:
        at_fault = isinstance(error, QuarotError) and not isinstance(error, OutputError | ClusterError)
        if at_fault or checkpoint.last_block() is None:
            checkpoint.remove()
        else:
            error.add_note(f"finished blocks are kept in {checkpoint.folder}: the same command goes on from there")
        raise
    checkpoint.remove()
