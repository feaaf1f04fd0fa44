"""Options of the GPTAQ authors' code that ask for nothing here: their command lines can be typed as they are."""

from dataclasses import dataclass
from typing import Annotated

from typer import Option


@dataclass(frozen=True, kw_only=True)
class GptaqOptions:
    """Options of the authors' ``main.py``."""

    fp32_had: Annotated[bool | None, Option("--fp32-had/--no-fp32-had", hidden=True)] = None


def idle_notes(options: GptaqOptions) -> tuple[str, ...]:
    """What to say of options of the authors' code that have no effect."""
    return () if options.fp32_had is None else ("of no effect here: --fp32-had",)
