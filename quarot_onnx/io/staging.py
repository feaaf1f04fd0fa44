"""A batch of output files that appears at once or not at all.

Files are written into a hidden folder beside their targets and moved into place by ``os.replace`` after the last one is
complete. Whatever interrupts the batch, ``KeyboardInterrupt`` included, leaves the output folder as it was.
"""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quarot_onnx.errors import OutputError
from quarot_onnx.io.links import refuse_broken

_SCRATCH = ".quarot-"
RUN_SUFFIX = ".quarot"
"""How the name of a run's hidden folder ends; it begins with a dot."""

_LONGEST = 100  # characters of an output's name that its scratch folder bears


class Batch:
    """The files of one batch, staged in ``scratch`` and moved in the order they were staged.

    Attributes:
        scratch: The hidden folder, on the same file system as the targets.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._targets: list[Path] = []
        self._leaving: list[Path] = []

    def stage(self, target: Path) -> Path:
        """Where to write the file that is to become ``target``."""
        self._targets.append(target)
        return self.scratch / target.name

    def take_away(self, file: Path) -> None:
        """Remove a file when the others are moved into place."""
        self._leaving.append(file)

    def commit(self) -> None:
        """Move every staged file into place; if one cannot be moved, put back what was there."""
        both = [*self._targets, *self._leaving]
        olds = {target: self.scratch / f"{target.name}.old" for target in both if os.path.lexists(target)}
        begun: list[Path] = []
        try:
            for target in both:
                begun.append(target)
                if target in olds:
                    target.replace(olds[target])
                if target not in self._leaving:
                    (self.scratch / target.name).replace(target)
        except BaseException:
            for target in reversed(begun):
                if target not in olds:
                    target.unlink(missing_ok=True)
                elif os.path.lexists(olds[target]):
                    olds[target].replace(target)
            raise


@contextmanager
def staged(target: Path) -> Iterator[Batch]:
    """Open a batch for ``target`` and what goes beside it, creating the folder if need be.

    Commits on success, leaves no trace otherwise.

    Args:
        target: The file that gives the batch its name.

    Raises:
        OSError: If the folder cannot be created or a file not moved.
    """
    folder = target.parent
    created: list[Path] = []
    scratch: Path | None = None
    complete = False
    try:
        for parent in reversed([folder, *folder.parents]):
            if not parent.exists():
                created.append(parent)
                parent.mkdir()
        scratch = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=folder))
        batch = Batch(scratch)
        yield batch
        batch.commit()
        complete = True
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if not complete:
            for parent in reversed(created):
                with suppress(OSError):
                    parent.rmdir()


def remove_stale(target: Path) -> None:
    """Remove what batches of ``target`` left that were killed; only for who knows that none is at work."""
    for path in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        if "." not in path.name.removeprefix(_prefix(target)):  # else of an output with a longer name
            shutil.rmtree(path, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f"{_SCRATCH}{target.name[:_LONGEST]}-"


def check_targets(
    targets: Iterable[Path], *, protected: Iterable[Path], overwrite: bool, usual: str = "model.onnx"
) -> None:
    """Refuse targets that cannot or must not be written, before anything is.

    Args:
        targets: The files to be written, absolute.
        protected: Files that must survive; compared resolved, and through hard links.
        overwrite: Whether existing targets may be replaced.
        usual: What a file such as the first is called.

    Raises:
        OutputError: Naming the first target at fault.
    """
    protected = list(protected)
    for number, target in enumerate(targets):
        for original in protected:
            if same_file(target, original):
                raise OutputError(f"output {target} would overwrite the input {original}; choose another output path")
        if target.is_dir():
            way = f"name a file in it, such as {target / usual}" if not number else "move it, or write elsewhere"
            raise OutputError(f"output {target} is a folder; {way}")
        if target.exists() and not overwrite:
            raise OutputError(f"output {target} exists and overwriting is off; choose another path or remove it")
        refuse_broken(target.parent, OutputError)
        parent = nearest_existing(target.parent)
        if not parent.is_dir():
            raise OutputError(f"output {target} cannot be written: {parent} is a file, not a folder")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"output {target} cannot be written: no permission to write in {parent}")


def check_free_space(folder: Path, needed: int) -> None:
    """Refuse a batch that the disk cannot hold.

    Args:
        folder: Where it is to be written; for a hidden folder of ours the error names the folder around it.
        needed: Bytes.

    Raises:
        OutputError: With the needed and the free bytes.
    """
    free = free_bytes(folder)
    if needed > free:
        hidden = (path for path in (folder, *folder.parents) if path.name.startswith(".") and path.suffix == RUN_SUFFIX)
        named = next((path.parent for path in hidden), folder)
        raise OutputError(
            f"not enough space in {named}: {needed:,} bytes needed, {free:,} free; free some or write elsewhere"
        )


def free_bytes(folder: Path) -> int:
    """Free bytes on the file system that holds, or will hold, ``folder``."""
    return shutil.disk_usage(nearest_existing(folder)).free


def nearest_existing(path: Path) -> Path:
    """``path`` or its nearest ancestor that exists."""
    return next(parent for parent in [path, *path.parents] if parent.exists())


def same_file(first: Path, second: Path) -> bool:
    """Whether two paths lead to one file, through symbolic or hard links."""
    if first.resolve() == second.resolve():
        return True
    return first.exists() and second.exists() and first.samefile(second)
