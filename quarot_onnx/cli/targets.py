"""Where ``rotate`` and ``quantize`` write to, and what lies there already."""

from pathlib import Path

from quarot_onnx.cli import options as opt
from quarot_onnx.errors import OutputError
from quarot_onnx.io.external import peek
from quarot_onnx.io.links import refuse_broken
from quarot_onnx.io.staging import same_file
from quarot_onnx.run.provenance import RECIPE_KEY


def target_file(out: Path, source: Path, *, overwrite: bool) -> Path:
    """The file to write.

    Args:
        out: A file, which may be replaced as it was named; or a folder, in which only a model that this tool wrote may
            be.
        source: The model that is read.
        overwrite: Whether any model may be replaced.

    Raises:
        OutputError: OUT is named like a file of another kind, or is a folder that holds another model of this name, or
            a link of this name whose target is missing.
    """
    target = opt.target_file(out, source)
    free = target == out or overwrite or not (target.is_file() or target.is_symlink()) or same_file(target, source)
    if not free and not _written_here(target):
        refuse_broken(target, OutputError)
        raise OutputError(
            f"the folder {out} holds another model of the name {target.name}: name the file itself "
            f"({target}), another folder, or insist with --overwrite"
        )
    return target


def _written_here(path: Path) -> bool:
    """Whether a model is an output of this tool."""
    proto = peek(path)
    return proto is not None and any(entry.key == RECIPE_KEY for entry in proto.metadata_props)
