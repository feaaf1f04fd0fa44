"""A prompt as a user's turn of a chat, written as the model's chat template says.

A template is a Jinja program that comes with a model, and is run as transformers runs it: in an immutable sandbox, with
``raise_exception``, ``strftime_now``, ``tojson`` and the blocks that transformers knows.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quarot_onnx.calibration.text_files import file_text
from quarot_onnx.calibration.tokenizer import token_text
from quarot_onnx.errors import CalibrationError
from quarot_onnx.io.companions import read_json

TEMPLATE_FILE = "chat_template.jinja"


def render(folder: Path, prompt: str) -> str:
    """A prompt as the first turn of a user, up to where the model answers.

    Args:
        folder: The tokenizer's, with chat_template.jinja, or with a template in tokenizer_config.json or
            chat_template.json.
        prompt: What the user says.

    Raises:
        CalibrationError: There is no template, it cannot be read, or it fails.
    """
    template, file = _template(folder)
    try:
        made = _environment().from_string(template)
        messages = [{"role": "user", "content": prompt}]
        return made.render(messages=messages, add_generation_prompt=True, tools=None, **_special_tokens(folder))
    except Exception as error:  # a template is a program: what it raises has no other base
        raise CalibrationError(
            f"the chat template of {file} fails ({type(error).__name__}: {error}): mend it, or go without --chat"
        ) from error


def _template(folder: Path) -> tuple[str, Path]:
    """A template and the file that it is from."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return file_text(file), file
    for file in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        found = read_json(file, CalibrationError).get("chat_template")
        if isinstance(found, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, Mapping)}
            found = named.get("default")
        if isinstance(found, str):
            return found, file
    raise CalibrationError(
        f"{folder} holds no chat template ({TEMPLATE_FILE}, or chat_template in tokenizer_config.json): put the "
        "model's beside its tokenizer.json, or go without --chat"
    )


def _special_tokens(folder: Path) -> dict[str, str]:
    """``bos_token``, ``eos_token`` and the like, by name."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, said in read_json(folder / name, CalibrationError).items():
            text = token_text(said)
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``, which marks for training what a model says: its content."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _json
    made.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return made


def _json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    """JSON that is no HTML; the arguments are those that templates give."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
