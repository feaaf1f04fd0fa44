"""Which BOS is used, and why."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_decoders as tiny
from tokenizers import processors

from quarot_onnx.calibration.bos import Bos, BosChoice, choose_bos
from quarot_onnx.errors import CalibrationError


def write(folder: Path, files: dict[str, object], post: str | None = None) -> Path:
    tokenizer = tiny.tokenizer()
    if post is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=[("<s>", 1), ("w2", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"tokenizer_config.json": {"bos_token": None}}, "tokenizer_config.json: bos_token is null"),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"bos_token": None}}, "special_tokens_map.json"),
        ({"tokenizer_config.json": {"bos_token": None}, "special_tokens_map.json": {"bos_token": "w7"}}, "tokenizer_"),
        ({"config.json": {"bos_token_id": None}, "genai_config.json": {"model": {"bos_token_id": 4}}}, "config.json"),
        ({"genai_config.json": {"model": {"bos_token_id": None}}}, "genai_config.json: bos_token_id is null"),
        ({"tokenizer_config.json": {"add_bos_token": False, "bos_token": "<s>"}}, "add_bos_token is false"),
    ],
)
def test_the_first_file_that_tells_decides_null_included(tmp_path: Path, files: dict[str, object], why: str) -> None:
    """The post-processor, and where nothing before it speaks config.json, would put one there."""
    earlier = any(name.startswith(("tokenizer", "special")) for name in files)
    found = choose_bos(write(tmp_path, files | ({"config.json": {"bos_token_id": 3}} if earlier else {}), "<s> $A"))
    assert found.id is None
    assert why in found.why


@pytest.mark.parametrize(
    ("post", "bos"), [("<s> $A", 1), ("$A w2", None), ("<s> $A w2", 1), ("$A", None), (None, None)]
)
def test_only_what_stands_before_a_text_is_a_bos(tmp_path: Path, post: str | None, bos: int | None) -> None:
    assert choose_bos(write(tmp_path, {}, post)).id == bos


def test_saved_padding_is_no_bos(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.enable_padding(length=8, pad_id=2, pad_token="w2", direction="left")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert choose_bos(tmp_path) == BosChoice(None, "no file names one")


def test_forced_and_forbidden(tmp_path: Path) -> None:
    folder = write(tmp_path, {"tokenizer_config.json": {"bos_token": None}, "config.json": {"bos_token_id": 3}})
    assert choose_bos(folder, Bos.FORCED) == BosChoice(3, "asked for, config.json: bos_token_id 3")
    assert choose_bos(folder, bos=True) == choose_bos(folder, Bos.FORCED), "True is not the id 1"
    assert choose_bos(folder, Bos.NONE) == choose_bos(folder, bos=False) == BosChoice(None, "asked for")
    assert choose_bos(folder, 5) == BosChoice(5, "asked for")
    declined = write(tmp_path, {"tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": False}})
    assert choose_bos(declined, Bos.FORCED).id == 1
    assert [Bos.of(value) for value in (None, True, False, 1)] == [Bos.AUTO, Bos.FORCED, Bos.NONE, 1]


def test_what_cannot_be_used_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no file beside .* names a BOS.*--bos-id N.*--no-bos"):
        choose_bos(write(tmp_path, {}), Bos.FORCED)
    for said in ([1], -1, True, "1"):
        folder = write(tmp_path, {"config.json": {"bos_token_id": said}})
        with pytest.raises(CalibrationError, match=r"config.json: bos_token_id .* is no token id: .*--bos-id N"):
            choose_bos(folder)
    given: list[Any] = [-1, 10**30, "1", 1.5]
    for bos in given:
        with pytest.raises(CalibrationError, match=r"the BOS .* is no token id: .*--bos-id N"):
            choose_bos(write(tmp_path, {}), bos)
    folder = write(tmp_path, {"tokenizer_config.json": {"bos_token": "<bos>"}})
    with pytest.raises(CalibrationError, match=r"names the BOS '<bos>', which .* does not know: .*--bos-id N"):
        choose_bos(folder)


def test_files_with_a_byte_order_mark(tmp_path: Path) -> None:
    folder = write(tmp_path, {})
    (folder / "tokenizer_config.json").write_bytes(b'\xef\xbb\xbf{"bos_token": "<s>"}')
    assert choose_bos(folder).id == 1


def test_a_bos_that_is_no_text(tmp_path: Path) -> None:
    """JSON can say half of a surrogate pair, which no tokenizer looks up."""
    folder = write(tmp_path, {"tokenizer_config.json": {"bos_token": "\ud83d"}})
    with pytest.raises(CalibrationError, match=r"names the BOS '\\ud83d', which .* does not know"):
        choose_bos(folder)
