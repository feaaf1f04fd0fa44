"""The command line: ``quarot-onnx``.

Only ``main`` lives here, so that an interrupt during the imports of the rest ends as quietly as any other.
"""

import os
import signal
import sys
from io import TextIOWrapper
from pathlib import Path
from types import FrameType

_INTERRUPTED = 130


class _TerminatedError(BaseException):
    """SIGTERM arrived: unwind like an interrupt, so that temporary files are removed."""


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise _TerminatedError


def _as_any_other() -> None:
    """Let a process that was forked end at a signal without a word: what it was helping with is told of here."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _ready_streams() -> None:
    """Send standard streams that were closed to nowhere; otherwise a model's file would get their descriptor.

    What the encoding of standard output lacks becomes a question mark: that is no reason to end with a traceback.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - open until the end
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _let_go() -> None:
    """Drop what standard output did not take, which is told already: Python would complain again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Run the command line and exit.

    Exit status: 0 done, 1 a verification failed, 2 bad input, 130 interrupted, 143 terminated.
    """
    _ready_streams()
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
        os.register_at_fork(after_in_child=_as_any_other)
    try:
        from quarot_onnx.cli.running import run  # noqa: PLC0415 - see above

        status = run()
    except KeyboardInterrupt:
        status = _INTERRUPTED
    except _TerminatedError:
        sys.stderr.write("terminated: no partial output was left\n")
        status = 143
    except BrokenPipeError:
        # The reader of our output is gone.
        status = 0
    if status == _INTERRUPTED:
        sys.stderr.write("interrupted: no partial output was left\n")
    _let_go()
    sys.exit(status)
