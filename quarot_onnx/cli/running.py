"""Run the command line in this process: every error becomes one line on standard error and an exit status."""

import sys
from collections.abc import Sequence
from itertools import pairwise

import typer

from quarot_onnx.cli.app import NAME, app
from quarot_onnx.cli.console import remark
from quarot_onnx.cli.signature import dashed
from quarot_onnx.errors import QuarotError

# The base of all errors in what was typed; typer brings its own copy of click and does not name it.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What was typed after the program's name; None for ``sys.argv``. Nothing at all asks for help.

    Returns:
        The exit status.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = app(given or ["--help"], prog_name=NAME, standalone_mode=False)
    except QuarotError as error:
        return _fail(str(error), error.exit_status)
    except _UsageError as error:
        return _fail(_usage(error, given), 2)
    except BrokenPipeError:
        raise
    except SystemExit as stopped:
        # typer's answer to a reader of our output that is gone; it is no failure of ours.
        if isinstance(stopped.__context__, BrokenPipeError):
            raise stopped.__context__ from None
        raise
    except OSError as error:
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 2)
    except MemoryError:
        return _fail("not enough memory for this model; close other programs or use a machine with more", 2)
    return status if isinstance(status, int) else 0


def _usage(error: Exception, given: Sequence[str]) -> str:
    """What is wrong with what was typed, the value itself, and where to read on."""
    message = str(getattr(error, "format_message", error.__str__)()).replace("Value error, ", "").rstrip(".")
    given = [dashed(word) if word.startswith("--") and "=" not in word else word for word in given]
    for option in getattr(getattr(error, "param", None), "opts", ()):
        values = [word.removeprefix(f"{option}=") for word in given if word.startswith(f"{option}=")]
        values += [value for word, value in pairwise(given) if word == option]
        if values and repr(values[-1]) not in message:
            message += f" (given {values[-1]!r})"
    context = getattr(error, "ctx", None)
    return f"{message}; see {NAME if context is None else context.command_path} --help"


def _fail(message: str, status: int) -> int:
    remark(f"error: {' '.join(message.split())}")
    return status
