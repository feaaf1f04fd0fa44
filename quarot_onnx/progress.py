"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int | None], None]
"""Called with what is done and, where it is known, of how much."""

PhaseProgress = Callable[[str, int, int | None], None]
"""The same, after the phase: "rotate", "verify", "calibrate", ..."""


def silent(_phase: str, _done: int, _total: int | None) -> None:
    """The progress of a caller who does not care."""


def of_phase(progress: PhaseProgress, phase: str) -> Progress:
    """The progress of one phase."""
    return lambda done, total: progress(phase, done, total)
