"""The hidden folder that belongs to an output while a run writes it: a lock, scratch space, perhaps a checkpoint.

::

    .model.onnx.quarot/     (.new.model.onnx.quarot/ in the folder above, while the output folder "new" does not exist)
      lock            held while a run is at work
      scratch/        the rotated model, hidden states that do not fit into memory
      ...             what rounding.checkpoint keeps

It goes with the run; only a checkpoint makes it stay. What a killed run left is removed by the next one to the same
output.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from quarot_onnx.errors import OutputError
from quarot_onnx.io.locks import LOCK, locked
from quarot_onnx.io.staging import RUN_SUFFIX, nearest_existing, remove_stale

_SCRATCH = "scratch"

_FULL = {errno.ENOSPC, errno.EDQUOT}


class RunFolder:
    """The folder of one output, locked."""

    def __init__(self, path: Path) -> None:
        """Use ``path``, which exists.

        Raises:
            OSError: The scratch folder cannot be made.
        """
        self.path = path
        self.scratch = path / _SCRATCH
        """For what need not outlive the run."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()

    def clear(self) -> None:
        """Remove all but the lock and the scratch folder."""
        for item in self.path.iterdir():
            if item.name in {LOCK, _SCRATCH}:
                continue
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item, ignore_errors=True)
            else:
                item.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the scratch folder, and the whole folder if it keeps nothing."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        kept = {item.name for item in self.path.iterdir()} if self.path.is_dir() else set()
        if kept <= {LOCK}:
            shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def run_folder(target: Path) -> Iterator[RunFolder]:
    """The folder that belongs to an output, locked against other runs and cleared of an earlier one's scratch.

    Args:
        target: The .onnx file that will be written.

    Raises:
        OutputError: It cannot be made, another run has it, or the disk is full.
    """
    named, target = target, target.absolute()
    path = _folder_of(target)
    where = path.parent
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot write to {named}: {where} takes no new folder ({error.strerror}); choose another output folder"
        ) from error
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path, target))
            folder = RunFolder(path)
            remove_stale(target)
        except OSError as error:
            raise OutputError(
                f"cannot write to {named}: {path} cannot be used ({error.strerror}); remove it, or "
                "choose another output"
            ) from error
        stack.callback(folder.close)
        try:
            yield folder
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise OutputError(
                f"no space is left in {where} for {named}: free some, and run the same command again"
            ) from error


def _folder_of(target: Path) -> Path:
    """The folder that belongs to an output: one that is there already, or one in the nearest folder that exists."""
    nearest = nearest_existing(target.parent)
    named = [
        parent / f".{'.'.join(target.relative_to(parent).parts)}{RUN_SUFFIX}" for parent in (nearest, *nearest.parents)
    ]
    return next((path for path in named if path.is_dir()), named[0])
