"""A limit of memory that no run can keep is told by every command that runs models."""

from pathlib import Path

import exports
import pytest
from command_line import Shell

TOLD = "--max-memory of 0 MB cannot be kept"


@pytest.mark.parametrize(
    "command",
    [
        ("verify", "MODEL", "MODEL", "--tokens", 8),
        ("compare", "MODEL", "MODEL", "--tokens", 8),
        ("evaluate", "MODEL", "--text", "TEXT", "--windows", 1, "--seq-len", 8, "--json"),
    ],
)
def test_it_is_told_once(command: tuple[object, ...], shell: Shell, text: Path) -> None:
    names = {"MODEL": exports.optimum_export("llama"), "TEXT": text}
    given = [names.get(word, word) if isinstance(word, str) else word for word in command]
    assert shell.ok(*given, "--max-memory", "1kb").err.count(TOLD) == 1
    assert TOLD not in shell.ok(*given, "--max-memory", "2GB").err
    assert "cannot be kept" not in shell.ok(*given).err
