"""Configurations in JSON and YAML files: read, write, and say where the fault is.

Duplicate keys, of which the standard parsers silently keep the last, are refused.
"""

import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Self

import yaml

from quarot_onnx.config.strict import Strict
from quarot_onnx.errors import ConfigError, OutputError
from quarot_onnx.io.links import refuse_broken
from quarot_onnx.io.staging import staged

# What Python's parsers refuse without saying where.
_HUGE_NUMBER = "a whole number or a date in it is not a possible one; no setting needs thousands of digits"
_DEEP = "its brackets are nested too deeply for a configuration; write it flat"


class FileConfig(Strict):
    """A `Strict` model that reads and writes JSON and YAML files.

    Relative paths inside a file are resolved against the file's folder.
    """

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a ``.json``, ``.yaml`` or ``.yml`` file.

        Raises:
            ConfigError: The file cannot be read, its suffix is another, or its content is wrong (see `from_json`).
        """
        suffix = Path(path).suffix.lower()
        if suffix == ".json":
            return cls.from_json(path)
        if suffix in {".yaml", ".yml"}:
            return cls.from_yaml(path)
        raise ConfigError(f"{path}: the suffix {suffix!r} is not known; use .json, .yaml or .yml")

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a JSON file.

        Raises:
            ConfigError: Not readable, not JSON (with line and column), or not a configuration (with key path).
        """
        try:
            data = json.loads(_text(path), object_pairs_hook=_without_duplicates)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from None
        except _DuplicateKeyError as error:
            raise ConfigError(f"{path}: {error}") from None
        except ValueError:
            raise ConfigError(f"{path}: {_HUGE_NUMBER}") from None
        except RecursionError:
            raise ConfigError(f"{path}: {_DEEP}") from None
        return cls.from_dict(data, source=path, folder=_folder(path))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file; an empty one holds no keys.

        Raises:
            ConfigError: Not readable, not YAML (with line and column), or not a configuration (with key path).
        """
        try:
            data = yaml.load(_text(path), Loader=_Loader)  # noqa: S506 - a SafeLoader
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "no position known"
            raise ConfigError(f"{path}: {place}: {error.problem}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
        except ValueError:
            raise ConfigError(f"{path}: {_HUGE_NUMBER}") from None
        except RecursionError:
            raise ConfigError(f"{path}: {_DEEP}") from None
        return cls.from_dict({} if data is None else data, source=path, folder=_folder(path))

    def to_json(self, path: str | Path) -> None:
        """Write a JSON file; raises OutputError where that is impossible."""
        _write(path, self.json_for(path))

    def json_for(self, path: str | Path) -> str:
        """What `to_json` writes to a file."""
        return json.dumps(self.to_dict(folder=_folder(path)), indent=2, ensure_ascii=False) + "\n"

    def to_yaml(self, path: str | Path) -> None:
        """Write a YAML file; raises OutputError where that is impossible."""
        _write(path, yaml.safe_dump(self.to_dict(folder=_folder(path)), sort_keys=False, allow_unicode=True))


class _DuplicateKeyError(ValueError):
    """A JSON object names a key twice."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(f"key {key!r} is given twice in one object; keep one of them")
        found[key] = value
    return found


class _Loader(yaml.SafeLoader):
    """The safe loader, refusing a key given twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {name!r} is given twice in one mapping; keep one of them", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def _folder(path: str | Path) -> Path:
    return Path(path).resolve().parent


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # editors on Windows write a byte order mark
    except OSError as error:
        refuse_broken(Path(path).absolute(), ConfigError)
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _write(path: str | Path, text: str) -> None:
    """A whole file or none; what is no file, such as /dev/stdout, is written to."""
    given, target = Path(path), Path(os.path.realpath(path))
    try:
        if not target.parent.is_dir() or given.is_relative_to("/dev") or (given.exists() and not given.is_file()):
            given.write_text(text, encoding="utf-8")
            return
        with staged(target) as batch:
            batch.stage(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
