"""Folders that belong to a run while it is at work, by a lock in them that goes with its process."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quarot_onnx.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"
"""The name of the file that is locked."""

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


@contextmanager
def locked(folder: Path, target: Path) -> Iterator[None]:
    """Keep other runs away from a folder; without effect where system or disk have no such locks.

    Raises:
        OutputError: Another run has it.
        OSError: The lock's file cannot be opened.
    """
    if fcntl is None:
        yield
        return
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another run is writing {target}; wait for it, or choose another output") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


def is_abandoned(folder: Path) -> bool:
    """Whether the run that locked a folder is gone; False where that cannot be known."""
    if fcntl is None:
        return False
    try:
        with (folder / LOCK).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
