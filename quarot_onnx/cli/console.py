"""What people see: progress and remarks on standard error, tables or one JSON object on standard output.

On a terminal tables are drawn by rich; elsewhere they are plain aligned lines, so that no path is wrapped or cut.
rich is imported where something is drawn: an error message needs none of it.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quarot_onnx.errors import OutputError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PHASES = {
    "rotate": "rotating weights",
    "verify": "comparing with the original",
    "own text": "writing text to calibrate on",
    "caches": "running windows for their caches",
    "calibrate": "calibrating",
    "round": "rounding weights",
    "correct": "correcting biases",
    "quantize": "quantizing",
    "check": "checking the quantized model",
    "save": "writing",
    "index": "looking for the tasks",
    "evaluate": "evaluating",
}


class Bars:
    """Progress bars, one per phase; call it with (phase, done, total)."""

    def __init__(self, progress: "Progress | None") -> None:
        """Draw on ``progress``, or nowhere."""
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """Show that ``done`` of ``total`` is done."""
        if self._progress is None:
            return
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(_PHASES.get(phase, phase), total=total)
        self._progress.update(self._tasks[phase], completed=done, total=total)


@contextmanager
def bars(*, quiet: bool) -> Iterator[Bars]:
    """Progress bars with the time left, on standard error; none when it is no terminal or ``quiet``."""
    if quiet or not sys.stderr.isatty():
        yield Bars(None)
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bars(progress)


def print_json(content: Mapping[str, object]) -> None:
    """One JSON object on standard output, and nothing else there; NaN and infinity become null."""
    say(json.dumps(_finite(content), indent=2, default=str, allow_nan=False))


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(line: str) -> None:
    """A line of results on standard output, never wrapped."""
    put(line + "\n")


def put(text: str) -> None:
    """Text on standard output, at once.

    Raises:
        OutputError: If it cannot be written; files that were written before are complete.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # a reader that has seen enough
    except OSError as error:
        raise OutputError(
            f"standard output cannot be written ({error.strerror or error}): what this command has to say is lost, "
            "files that it wrote are complete; send its output elsewhere"
        ) from error


def remark(line: str) -> None:
    """A line on standard error."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def notes(items: Sequence[str]) -> None:
    """Remarks that a run left behind."""
    for item in items:
        remark(f"note: {item}")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; columns after the first are set right where they are numbers."""
    numeric = [i > 0 and all(row[i][:1].isdigit() or row[i] == "-" for row in rows) for i in range(len(columns))]
    if not sys.stdout.isatty():
        say("\n".join([title, *_aligned([columns, *rows], numeric)]))
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    drawn = Table(title=Text(title), title_justify="left")
    for column, right in zip(columns, numeric, strict=True):
        drawn.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))
    Console(highlight=False).print(drawn)


def _aligned(rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, numeric, strict=True)
        yield ("  " + "  ".join(c.rjust(width) if right else c.ljust(width) for c, width, right in cells)).rstrip()
