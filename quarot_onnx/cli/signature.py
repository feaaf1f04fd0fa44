"""Options as a dataclass: declared once, with their help, and handed over whole."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


def dashed(name: str) -> str:
    """An option or a choice as it is spelt here: ``w_bits``, as in the GPTAQ authors' code, is ``w-bits``."""
    return name.replace("_", "-")


def takes(options: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Make a function of one dataclass a command with the dataclass's fields as its parameters.

    Args:
        options: A dataclass whose fields are annotated for typer.
    """

    def command(function: Callable[[T], None]) -> Callable[..., None]:
        @wraps(function)
        def called(**given: Any) -> None:
            function(options(**given))

        # Where typer looks for parameters.
        called.__signature__ = inspect.signature(options)  # type: ignore[attr-defined]
        called.__annotations__ = get_type_hints(options, include_extras=True)
        return called

    return command
