"""Paths in configurations."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, SerializationInfo, ValidationInfo


def _empty_is_none(value: object) -> object:
    return None if value == "" else value  # AMD Quark documents "" as the default of a path


def _resolved(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder")
    return path if folder is None else folder / path  # an absolute path stays as it is


def _written(path: Path | None, info: SerializationInfo) -> str | None:
    folder = (info.context or {}).get("folder")
    if path is None or folder is None:
        return None if path is None else str(path)
    absolute = path.absolute()
    return str(absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute)


ConfigPath = Annotated[
    Annotated[Path, AfterValidator(_resolved)] | None, BeforeValidator(_empty_is_none), PlainSerializer(_written)
]
"""A path in a configuration: relative to the folder of the file it is written in, else to the working directory."""
