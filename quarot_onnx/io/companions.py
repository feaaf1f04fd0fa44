"""The files beside a model that make its folder usable elsewhere: configs, tokenizer, chat template.

Hugging Face tools, optimum and onnxruntime-genai read them from the folder of the ``.onnx`` file. Weights and other
models are never companions.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from quarot_onnx.errors import ConfigError, InputError

GENAI_CONFIG = "genai_config.json"
_PATTERNS = (
    "config.json",
    "generation_config.json",
    GENAI_CONFIG,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "*preprocessor_config.json",
    "*.jinja",
)


@dataclass(frozen=True)
class GenaiSettings:
    """What onnxruntime-genai is to set, in a genai_config.json that is copied along.

    Attributes:
        session_options: onnxruntime's, by name, of the decoder.
        search: Of how it generates.
    """

    session_options: Mapping[str, str] = field(default_factory=dict)
    search: Mapping[str, object] = field(default_factory=dict)


NO_SETTINGS = GenaiSettings()
"""All as it is."""


def companion_files(folder: Path, *, exclude: Iterable[Path]) -> list[Path]:
    """The companion files of a model folder, sorted by name.

    Args:
        folder: The folder of the source model; its subfolders are not searched.
        exclude: Files that are not companions whatever their names, such as the model's own data files.

    Returns:
        Paths in ``folder``; symbolic links are listed as they are.
    """
    excluded = {path.resolve() for path in exclude}
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.resolve() not in excluded
        and any(fnmatch(path.name, pattern) for pattern in _PATTERNS)
    ]


def companion_bytes(path: Path, *, model_name: str, genai: GenaiSettings) -> bytes:
    """The content of a companion file for a folder whose model has the file name ``model_name``.

    Files are kept byte for byte, except that a ``genai_config.json`` names the new model and has the settings
    ``genai``.

    Raises:
        ConfigError: If a ``genai_config.json`` is not valid JSON.
    """
    content = path.read_bytes()
    if path.name != GENAI_CONFIG:
        return content
    try:
        config = json.loads(content)
    except ValueError as error:
        raise ConfigError(
            f"{path} is not valid JSON ({error}); repair it or move it out of the model folder"
        ) from error
    model = config.get("model") if isinstance(config, dict) else None
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(decoder, dict):
        return content
    before = json.dumps(config)
    if decoder.get("filename") is not None:
        decoder["filename"] = model_name
    for section, name, settings in (
        (decoder, "session_options", genai.session_options),
        (config, "search", genai.search),
    ):
        if settings:
            earlier = section.get(name)
            section[name] = (earlier if isinstance(earlier, dict) else {}) | dict(settings)
    if json.dumps(config) == before:
        return content
    return (json.dumps(config, indent=4, ensure_ascii=False) + "\n").encode()


def genai_providers(folder: Path) -> frozenset[str]:
    """The execution providers that a folder's genai_config.json names for the decoder, in small letters.

    One that is no configuration names none; what is wrong with it is told where it is copied.
    """
    try:
        config = read_json(folder / GENAI_CONFIG, ConfigError)
    except ConfigError:
        return frozenset()
    named = section(config, "model", "decoder", "session_options").get("provider_options")
    entries = named if isinstance(named, list) else []
    return frozenset(str(name).lower() for entry in entries if isinstance(entry, dict) for name in entry)


def section(content: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The object that keys lead to in a companion file's content; empty where there is none."""
    for key in keys:
        inner = content.get(key)
        content = inner if isinstance(inner, dict) else {}
    return content


def read_json(path: Path, error: type[InputError]) -> dict[str, Any]:
    """The object in a companion file, empty where there is no file.

    Raises:
        InputError: Of the class ``error``: the file is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows write a mark
    except (OSError, ValueError) as problem:
        raise error(f"{path} is not readable JSON: {problem}; mend or remove it") from problem
    if not isinstance(content, dict):
        raise error(f"{path} holds no JSON object; mend or remove it")
    return content
