"""What is to be exported: a GGUF file, or a Hugging Face folder with all of its weights."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quarot_onnx.errors import ModelError, first_and_more
from quarot_onnx.io.links import refuse_broken

_WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The files by which transformers finds weights, the first of them that is there."""

_DEQUANTIZED = "mxfp4"
"""The one quantization that is undone where weights are loaded."""


def find_source(source: Path) -> Path:
    """The GGUF file or the Hugging Face folder that ``source`` stands for."""
    if source.is_file():
        with _readable(source), source.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{source} is not a GGUF file; pass a GGUF file or a Hugging Face folder")
        return source.absolute()
    if not source.is_dir():
        refuse_broken(source.absolute(), ModelError)
        raise ModelError(f"no model at {source}; pass a Hugging Face folder or a GGUF file")
    with _readable(source):
        names = [path.name for path in source.iterdir()]
    weights = [name for name in names if name.endswith(".safetensors") or name.startswith("pytorch_model")]
    if "adapter_config.json" in names and not any(name in _WHOLE for name in names):
        raise ModelError(
            f"{source} is an adapter (PEFT) and no whole model: merge it into its base model first "
            "(merge_and_unload(), then save_pretrained) and export that"
        )
    if "config.json" in names and weights:
        _check_config(source / "config.json")
        _check_shards(source, names)
        return source.absolute()
    files = sorted(name for name in names if name.endswith(".gguf"))
    if len(files) == 1:
        return find_source(source / files[0])
    if files:
        raise ModelError(f"{source} holds {len(files)} GGUF files; pass one of them, such as {source / files[0]}")
    if "config.json" in names:
        raise ModelError(f"{source} has a config.json but no weights; add model.safetensors or pytorch_model.bin")
    raise ModelError(f"{source} has neither config.json nor a GGUF file; pass a Hugging Face folder or a GGUF file")


def _check_config(path: Path) -> None:
    config = _object(path)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} names no model_type; it is not the config.json of a transformers model")
    stored = config.get("quantization_config")
    method = stored.get("quant_method", "of no name") if isinstance(stored, dict) else None
    if method not in (None, _DEQUANTIZED):
        raise ModelError(
            f"{path}: the weights are quantized already (quantization_config, quant_method {method}): export the float "
            "checkpoint that they were made from, and quantize that here"
        )


def _check_shards(folder: Path, names: Collection[str]) -> None:
    """Refuse weights that transformers would not find; it looks for those of ``_WHOLE`` in that order."""
    found = next((name for name in _WHOLE if name in names), None)
    if found is None:
        raise ModelError(
            f"{folder} has none of {', '.join(_WHOLE)}: weights in several files need the index that lies beside them "
            "where they come from"
        )
    if not found.endswith(".json"):
        return
    shards = _object(folder / found).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{folder / found} has no weight_map; fetch it again")
    missing = sorted({str(name) for name in shards.values()} - set(names))
    if missing:
        raise ModelError(f"{folder} lacks {first_and_more(missing)}, which {found} names; fetch the weights again")


def _object(path: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        ModelError: It cannot be read, or is no JSON object.
    """
    try:
        with _readable(path):
            found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not a JSON object ({error}); take it from the model's own folder") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} is not a JSON object; take it from the model's own folder")
    return found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
