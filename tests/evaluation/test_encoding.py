"""Texts become the ids that the tokenizer of transformers makes of them."""

import json
from pathlib import Path

import exports
import pytest
import tiny_decoders as tiny
from transformers import AutoTokenizer

from quarot_onnx.calibration.bos import Bos
from quarot_onnx.errors import CalibrationError
from quarot_onnx.evaluation.encoding import Encoding

TEXT = "The fox"
IDS = list(TEXT.encode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in exports.optimum_export("llama").parent.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def settings(folder: Path, **changed: object) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((folder / name).read_text()) | changed
        (folder / name).write_text(json.dumps({key: said for key, said in content.items() if said is not None}))


def test_as_transformers_does(folder: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(folder), Encoding.of(folder)
    for text in (TEXT, f"<s>{TEXT}", "", "<s>"):
        begun = text.startswith("<s>")  # lm-eval's back end asks for no special tokens then
        assert ours.ids(text) == theirs.encode(text, add_special_tokens=not begun)
        assert ours.ids(text, special=False) == theirs.encode(text, add_special_tokens=False)
    assert len(ours.ids(TEXT)) == len(TEXT) + 1
    assert ours.prefix == theirs.bos_token_id == exports.BOS


def test_a_bos_that_is_asked_for(folder: Path) -> None:
    plain = Encoding.of(folder, Bos.NONE).ids(TEXT)
    assert len(plain) == len(TEXT)
    assert Encoding.of(folder, Bos.FORCED).ids(TEXT) == [exports.BOS, *plain]
    seven = Encoding.of(folder, 7)
    assert seven.ids(TEXT) == [7, *plain]
    assert seven.ids(TEXT, special=False) == plain
    assert seven.prefix == 7


def test_what_stands_in_for_a_context(folder: Path, tmp_path: Path) -> None:
    settings(folder, bos_token=None)
    assert Encoding.of(folder).prefix == exports.EOS
    settings(folder, eos_token=None)
    assert Encoding.of(folder).prefix == exports.BOS, "config.json names it"
    bare = tmp_path / "bare"
    bare.mkdir()
    tiny.tokenizer().save(str(bare / "tokenizer.json"))
    nobody = Encoding.of(bare)
    assert nobody.ids("w3 w4") == [3, 4]
    with pytest.raises(CalibrationError, match="--bos-id N"):
        _ = nobody.prefix


def test_what_is_no_character(folder: Path) -> None:
    with pytest.raises(CalibrationError, match=r"^a text of a task holds half of .* pair, .* \(behind 'a'\): take"):
        Encoding.of(folder).ids("a\ud83d")
    settings(folder, bos_token="\ud83d")
    assert Encoding.of(folder).prefix == exports.EOS, "a token that no tokenizer knows"
