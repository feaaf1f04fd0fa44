"""Folders that cannot be exported are told of by their files, before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from quarot_onnx.errors import ModelError
from quarot_onnx.export.source import find_source

CONFIG = {"model_type": "llama"}
PART = "model-0000{}-of-00003.safetensors"
INDEX = {"weight_map": {"a": PART.format(1), "b": PART.format(2), "c": PART.format(3), "d": PART.format(3)}}


def folder(place: Path, *empty: str, **contents: Any) -> Path:
    """A folder of empty files, and JSON files by their names without suffix."""
    place.mkdir()
    for name in empty:
        (place / name).touch()
    for name, content in contents.items():
        (place / f"{name}.json").write_text(json.dumps(content))
    return place


def index(content: Any, stem: str = "model.safetensors") -> dict[str, Any]:
    return {"config": CONFIG, f"{stem}.index": content}


@pytest.mark.parametrize(
    ("empty", "contents", "message"),
    [
        (
            [PART.format(1)],
            index(INDEX),
            r"lacks model-00002.*, model-00003\S*, which model\.safetensors\.index.* fetch",
        ),
        ([], index({}, "pytorch_model.bin"), r"bin\.index\.json has no weight_map"),
        ([], index([]), r"index\.json is not a JSON object"),
        ([PART.format(1)], {"config": CONFIG}, r"in parts .* no model\.safetensors\.index\.json; fetch that"),
        (["consolidated.safetensors"], {"config": CONFIG}, "no weights; add model.safetensors or pytorch_model.bin"),
        (["adapter_model.safetensors"], {"adapter_config": {}}, "is an adapter .* merge it .*merge_and_unload"),
        (["adapter_model.safetensors"], {"adapter_config": {}, "config": CONFIG}, "is an adapter .* merge it"),
        (["model.safetensors"], {"adapter_config": {}, "config": CONFIG}, "an adapter beside its model.* or remove"),
    ],
)
def test_a_folder_that_is_not_whole(empty: list[str], contents: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        find_source(folder(tmp_path / "source", *empty, **contents))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_quantized_weights(method: str, tmp_path: Path) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": method, "bits": 4}}
    with pytest.raises(ModelError, match=f"quantized .*{method}.*; export the float checkpoint"):
        find_source(folder(tmp_path / "source", "model.safetensors", config=config))


@pytest.mark.parametrize("content", [b"{oops", b"{}", b"\xff", b'{"version": "1.0", "model": {"type": "Nonesuch"}}'])
def test_a_tokenizer_that_cannot_be_read(content: bytes, tmp_path: Path) -> None:
    source = folder(tmp_path / "source", "model.safetensors", config=CONFIG)
    (source / "tokenizer.json").write_bytes(content)
    with pytest.raises(
        ModelError, match=r"source/tokenizer\.json is no tokenizer\.json .*; fetch it again, or remove it"
    ):
        find_source(source)


def test_a_tokenizer_that_is_a_link_to_nothing(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", "model.safetensors", config=CONFIG)
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")
    with pytest.raises(ModelError, match=r"tokenizer\.json is a link to .*blob, which is missing"):
        find_source(source)


def test_folders_that_are_whole(tmp_path: Path) -> None:
    parts = folder(tmp_path / "parts", *(PART.format(i) for i in (1, 2, 3)), **index(INDEX))
    binary = folder(tmp_path / "bin", "pytorch_model.bin", config=CONFIG | {"quantization_config": None})
    packed = folder(
        tmp_path / "packed", "model.safetensors", config=CONFIG | {"quantization_config": {"quant_method": "mxfp4"}}
    )
    for source in (parts, binary, packed):
        assert find_source(source) == source
