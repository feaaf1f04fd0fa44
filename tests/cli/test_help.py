"""The help, on terminals of common widths: every option can be read and typed as it stands there."""

from collections.abc import Iterator

import pytest
import typer
from command_line import Shell

from quarot_onnx.cli.app import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def names(command: str) -> Iterator[str]:
    """All names of the visible options of a command."""
    for option in COMMANDS[command].params:
        if option.param_type_name == "option" and not option.hidden:
            yield from (*option.opts, *option.secondary_opts)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_names_are_not_cut(command: str, width: int, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = shell.ok(command, "--help").out.splitlines()
    assert max(map(len, lines)) == width
    assert "…" not in "".join(lines)
    # Rows begin with a name, after an asterisk where it must be given; what explains an option names others, too.
    rows = [line.strip("│ ").removeprefix("*").strip() for line in lines if line.startswith("│")]
    shown = {word for row in rows if row.startswith("-") for word in row.split()}
    assert set(names(command)) <= shown


def test_there_are_names_to_look_at() -> None:
    assert {"--no-enable-aq-calibration", "--nsamples", "--a-asym"} <= set(names("quantize"))
