"""Symbolic links whose targets are gone, which look like files that are not there."""

from pathlib import Path

from quarot_onnx.errors import InputError


def refuse_broken(path: Path, error: type[InputError]) -> None:
    """Refuse a path that leads nowhere because of a link, its own or that of a folder on its way.

    Args:
        path: What is to be read, or a folder to write into.
        error: The class of the error.

    Raises:
        InputError: Of the class ``error``: a link's target is missing; nothing is said of paths without one.
    """
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise error(f"{place} is a link to {place.readlink()}, which is missing: put that there, or mend the link")
