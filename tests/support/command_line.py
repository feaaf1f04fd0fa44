"""The command line in this process, and what it leaves behind."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quarot_onnx.cli.running import run


@dataclass(frozen=True)
class Result:
    """Exit status and what was printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be one JSON object and nothing else."""
        content = json.loads(self.out)
        assert isinstance(content, dict)
        return content


class Shell:
    """Runs commands; bad input must give one line, and no trace."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *arguments: object) -> Result:
        self._capfd.readouterr()
        status = run([str(argument) for argument in arguments])
        out, err = self._capfd.readouterr()
        return Result(status, out, err)

    def ok(self, *arguments: object) -> Result:
        result = self(*arguments)
        assert result.status == 0, result.err
        return result

    def fails(self, *arguments: object, status: int = 2) -> str:
        """The one line of an error."""
        result = self(*arguments)
        assert result.status == status, result
        lines = result.err.splitlines()
        assert len(lines) == 1, result.err
        assert lines[0].startswith("error: ")
        assert not result.out
        return lines[0]


def files(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones too, with their content; folders as empty."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in _walk(folder)}


def _walk(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.rglob("*"))
