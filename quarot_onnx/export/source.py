"""What an export reads: a Hugging Face folder that is whole, by its files, or a GGUF file."""

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer  # type: ignore[import-untyped]

from quarot_onnx.errors import ModelError, first_and_more
from quarot_onnx.io.links import refuse_broken

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What transformers looks for, in its order; each may be in parts, with an index."""
_PART = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
_ADAPTER = "adapter_config.json"
_TOKENIZER = "tokenizer.json"
_CLASSES = ("AutoModelForCausalLM", "AutoModel", "AutoConfig")
"""What of a model may be code of its own, by transformers' names; that of a tokenizer is of no consequence."""
_SHOWN = 3


def find_source(source: Path) -> Path:
    """The GGUF file or the Hugging Face folder that ``source`` stands for, absolute.

    Raises:
        ModelError: There is none, or it is seen from its files that it cannot be exported.
    """
    if source.is_file():
        with _readable(source), source.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{source} is not a GGUF file; pass a GGUF file or a Hugging Face folder")
        return source.absolute()
    if not source.is_dir():
        refuse_broken(source.absolute(), ModelError)
        raise ModelError(f"no model at {source}; pass a Hugging Face folder or a GGUF file")
    with _readable(source):
        names = sorted(path.name for path in source.iterdir())
    if _is_model(source, names):
        return source.absolute()
    files = [name for name in names if name.endswith(".gguf")]
    if len(files) == 1:
        return find_source(source / files[0])
    raise ModelError(_nothing(source, names, files))


def weight_files(source: Path) -> list[Path]:
    """The files that hold the weights of a folder from `find_source`."""
    for name in _WEIGHTS:
        if (source / name).exists():
            return [source / name]
        if (index := source / f"{name}.index.json").exists():
            return [source / part for part in sorted({*_json_object(index)["weight_map"].values()})]
    return []


def own_code(source: Path) -> str | None:
    """The class by which a folder's config.json says that the model is to be loaded, where it is of no package.

    Raises:
        ModelError: config.json cannot be read.
    """
    path = source / "config.json"
    classes = _json_object(path).get("auto_map") if path.is_file() else None
    if not isinstance(classes, dict):
        return None
    return next((str(classes[name]) for name in _CLASSES if classes.get(name)), None)


def _is_model(source: Path, names: Collection[str]) -> bool:
    """Whether a folder holds a config.json and weights.

    Raises:
        ModelError: It does, but not all of them, or such as cannot be exported.
    """
    name = next((name for name in _WEIGHTS if name in names or f"{name}.index.json" in names), None)
    if name is None or "config.json" not in names:
        return False
    _check_config(source / "config.json")
    if name not in names:
        _check_parts(source / f"{name}.index.json", names)
    if _ADAPTER in names:
        raise ModelError(
            f"{source} has an adapter beside its model ({_ADAPTER}), which would be left out; {_merging()}; or remove "
            f"{_ADAPTER} where the weights hold the adapter already"
        )
    if _TOKENIZER in names:
        _check_tokenizer(source / _TOKENIZER)
    return True


def _check_config(path: Path) -> None:
    config = _json_object(path)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} names no model_type; it is not the config.json of a transformers model")
    packed = config.get("quantization_config") or config.get("compression_config")
    method = packed.get("quant_method", "no quant_method") if isinstance(packed, dict) else packed
    if packed and method != "mxfp4":  # which optimum makes floats of
        raise ModelError(
            f"{path} says that the weights are quantized (quantization_config: {method}); export the float checkpoint "
            "that they were made from"
        )


def _check_tokenizer(path: Path) -> None:
    """See to it that the tokenizer can be read, which goes with the model as it is."""
    refuse_broken(path, ModelError)
    with _readable(path):
        content = path.read_bytes()
    try:
        Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(
            f"{path} is no tokenizer.json of the tokenizers library ({error}); fetch it again, or remove it to export "
            "the model without"
        ) from error


def _check_parts(index: Path, names: Collection[str]) -> None:
    """See to it that the files are there among which an index divides the weights."""
    places = _json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{index} has no weight_map; fetch it again, or save the model in one file")
    absent = sorted({str(name) for name in places.values()} - {*names})
    if absent:
        raise ModelError(
            f"{index.parent} lacks {first_and_more(absent, _SHOWN)}, which {index.name} names; fetch what is missing"
        )


def _nothing(source: Path, names: Collection[str], files: list[str]) -> str:
    """Why a folder is no model."""
    if files:
        return f"{source} holds {len(files)} GGUF files; pass one of them, such as {source / files[0]}"
    if _ADAPTER in names:
        return f"{source} is an adapter ({_ADAPTER}), not a whole model; {_merging()}"
    if "config.json" not in names:
        return f"{source} has neither config.json nor a GGUF file; pass a Hugging Face folder or a GGUF file"
    if parts := [name for name in names if _PART.fullmatch(name)]:
        whole = re.sub(r"-\d+-of-\d+", "", parts[0])
        return f"{source} has weights in parts ({parts[0]}) but no {whole}.index.json; fetch that, too"
    return f"{source} has a config.json but no weights; add {' or '.join(_WEIGHTS)}"


def _merging() -> str:
    return "merge it into its base model with peft (merge_and_unload, then save_pretrained), and export that folder"


def _json_object(path: Path) -> dict[str, Any]:
    try:
        with _readable(path):
            content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not a JSON object ({error}); take it from the model's own folder") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object; take it from the model's own folder")
    return content


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
