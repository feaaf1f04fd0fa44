"""Where ``rotate`` and ``quantize`` write to, and what lies there already."""

from pathlib import Path
from typing import Protocol

from quarot_onnx.cli import options as opt
from quarot_onnx.errors import OutputError
from quarot_onnx.io.external import peek
from quarot_onnx.io.staging import same_file
from quarot_onnx.run.provenance import RECIPE_KEY


class _Options(Protocol):
    """What was typed of OUT."""

    @property
    def out(self) -> Path: ...

    @property
    def overwrite(self) -> bool: ...


def target_file(options: _Options, source: Path) -> Path:
    """The file to write.

    Args:
        options: A file, which may be replaced as it was named; or a folder, in which only a model that this tool wrote
            may be.
        source: The model that is read.

    Raises:
        OutputError: OUT is named like a file of another kind, or is a folder that holds another model of this name.
    """
    target = opt.target_file(options.out, source)
    free = target == options.out or options.overwrite or not target.is_file() or same_file(target, source)
    if not free and not _written_here(target):
        raise OutputError(
            f"the folder {options.out} holds another model of the name {target.name}: name the file itself "
            f"({target}), another folder, or insist with --overwrite"
        )
    return target


def _written_here(path: Path) -> bool:
    """Whether a model is an output of this tool."""
    proto = peek(path)
    return proto is not None and any(entry.key == RECIPE_KEY for entry in proto.metadata_props)
