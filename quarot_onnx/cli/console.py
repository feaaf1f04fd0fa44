"""What people see: progress on standard error, tables or one JSON object on standard output."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

ERR = Console(stderr=True, highlight=False, soft_wrap=True)
OUT = Console(highlight=False)

_PHASES = {
    "rotate": "rotating weights",
    "verify": "comparing with the original",
    "calibrate": "calibrating",
    "quantize": "quantizing",
    "save": "writing",
    "evaluate": "evaluating",
}


class Bars:
    """Progress bars, one per phase; call it with (phase, done, total)."""

    def __init__(self, progress: Progress | None) -> None:
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
    if quiet or not ERR.is_terminal:
        yield Bars(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=ERR, transient=True) as progress:
        yield Bars(progress)


def print_json(content: Mapping[str, object]) -> None:
    """One JSON object on standard output, and nothing else there."""
    OUT.file.write(json.dumps(content, indent=2, default=str) + "\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; columns after the first are numbers, set right."""
    drawn = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        drawn.add_row(*row)
    OUT.print(drawn)


def notes(items: Sequence[str]) -> None:
    """Remarks on standard error."""
    for item in items:
        ERR.print(f"note: {item}", markup=False)
