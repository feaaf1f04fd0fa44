"""Which files travel with a model, and how genai_config.json follows a new name."""

import json

import io_models
import pytest

from quarot_onnx.errors import ConfigError, OutputError
from quarot_onnx.io import model_io
from quarot_onnx.io.companions import GenaiSettings, companion_bytes, companion_files

GENAI = {
    "model": {"bos_token_id": 1, "decoder": {"filename": "in.onnx", "head_size": 64}},
    "search": {"top_k": 5},
    "name": "modèle",
}
COMPANIONS = [
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "genai_config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
]
OTHERS = ["README.md", "in.quarot.json", "model.safetensors", "other.onnx", "pytorch_model.bin"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name in COMPANIONS + OTHERS:
        (folder / name).write_text(name)
    (folder / "genai_config.json").write_text(json.dumps(GENAI))
    (folder / "vocab.d").mkdir()
    io_models.write(io_models.linear_model(), folder / "in.onnx")
    return folder


def test_companions_are_found_by_name(folder):
    assert [path.name for path in companion_files(folder, exclude=[])] == COMPANIONS
    (folder / "vocab.bin").write_text("weights")
    found = companion_files(folder, exclude=[folder / "vocab.bin", folder / "config.json"])
    assert [path.name for path in found] == [name for name in COMPANIONS if name != "config.json"]


def test_save_copies_companions_and_renames_the_decoder(folder, tmp_path):
    before = io_models.tree(folder)
    model = model_io.load(folder / "in.onnx")
    model_io.save(model, tmp_path / "out" / "small.onnx", companions_from=folder)
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == sorted([*COMPANIONS, "small.onnx"])
    text = (tmp_path / "out" / "genai_config.json").read_text()
    assert "modèle" in text
    config = json.loads(text)
    assert config == {**GENAI, "model": {"bos_token_id": 1, "decoder": {"filename": "small.onnx", "head_size": 64}}}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"
    assert io_models.tree(folder) == before


def test_save_into_the_source_folder_leaves_the_companions_alone(folder):
    before = io_models.tree(folder)
    model_io.save(model_io.load(folder / "in.onnx"), folder / "small.onnx", companions_from=folder)
    after = io_models.tree(folder)
    assert set(after) - set(before) == {"small.onnx"}
    assert {name: after[name] for name in before} == before


def test_existing_companions_count_as_outputs(folder, tmp_path):
    (tmp_path / "config.json").write_text("precious")
    model = model_io.load(folder / "in.onnx")
    with pytest.raises(OutputError, match=r"config\.json exists and overwriting is off"):
        model_io.save(model, tmp_path / "small.onnx", companions_from=folder, overwrite=False)
    with pytest.raises(OutputError, match=r"config\.json would overwrite the input"):
        model_io.save(model, tmp_path / "small.onnx", companions_from=folder, forbid=[tmp_path / "config.json"])
    assert (tmp_path / "config.json").read_text() == "precious"


def test_a_genai_config_that_already_fits_is_kept_byte_for_byte(folder):
    path = folder / "genai_config.json"
    assert companion_bytes(path, model_name="in.onnx", genai=GenaiSettings()) == path.read_bytes()
    for odd in ("[]", '{"model": 1}', '{"model": {"decoder": {}}}'):
        path.write_text(odd)
        assert companion_bytes(path, model_name="out.onnx", genai=GenaiSettings()) == odd.encode()


def test_a_broken_genai_config_is_a_config_error(folder):
    path = folder / "genai_config.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"genai_config\.json is not valid JSON"):
        companion_bytes(path, model_name="out.onnx", genai=GenaiSettings())


def test_settings_join_those_that_are_there(folder):
    path = folder / "genai_config.json"
    decoder = {"filename": "in.onnx", "session_options": {"log_id": "x"}}
    path.write_text(json.dumps({"model": {"decoder": decoder}, "search": {"a": 1, "b": True}}))
    made = json.loads(
        companion_bytes(path, model_name="in.onnx", genai=GenaiSettings({"session.a": "1"}, {"b": False}))
    )
    assert made["model"]["decoder"]["session_options"] == {"log_id": "x", "session.a": "1"}
    assert made["search"] == {"a": 1, "b": False}
