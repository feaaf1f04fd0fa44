"""Nothing is replaced that was neither named nor written by an earlier run to the same output."""

import json

import io_models
import pytest

from quarot_onnx.errors import OutputError
from quarot_onnx.io import model_io
from quarot_onnx.io.replacing import Earlier, Outputs

COMPANIONS = {"config.json": '{"a": 1}', "tokenizer.json": "tokens", "merges.txt": "merges"}
RECIPE = {"version": "0.1.0", "quantization": {}}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name, text in COMPANIONS.items():
        (folder / name).write_text(text)
    return io_models.write(io_models.linear_model(), folder / "in.onnx")


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def save(source, target, **options):
    """As the pipeline does: an early check, and the output with companions and report."""
    model, folder = model_io.load(source), source.parent
    model_io.check_target(model, target, companions_from=folder, overwrite=options.get("overwrite"))
    return model_io.save(model, target, companions_from=folder, report=RECIPE, **options)


def refusal(source, target, **options):
    """The message of the early check, which `save` alone gives too; nothing is written."""
    before = io_models.tree(target.parent)
    model, folder = model_io.load(source), source.parent
    with pytest.raises(OutputError) as late:
        model_io.save(model, target, companions_from=folder, report=RECIPE, **options)
    with pytest.raises(OutputError) as early:
        model_io.check_target(model, target, companions_from=folder)
    assert io_models.tree(target.parent) == before
    assert str(early.value) == str(late.value)
    return str(early.value)


def test_files_of_another_project_are_listed_and_stay(source, out):
    (out / "config.json").write_text("mine")
    (out / "tokenizer.json").write_text("mine too")
    message = refusal(source, out / "m.onnx")
    assert f"config.json, tokenizer.json in {out}" in message
    assert "merges.txt" not in message
    assert "--overwrite" in message
    save(source, out / "m.onnx", overwrite=True)
    assert (out / "config.json").read_text() == COMPANIONS["config.json"]


@pytest.mark.parametrize("link", ["elsewhere", "nowhere"])
def test_links_count_as_files(source, out, tmp_path, link):
    (tmp_path / "elsewhere").write_text("mine")
    (out / "config.json").symlink_to(tmp_path / link)
    assert "config.json" in refusal(source, out / "m.onnx")


def test_the_same_content_is_no_obstacle_and_never_becomes_ours(source, out):
    (out / "config.json").write_text(COMPANIONS["config.json"])
    save(source, out / "m.onnx")
    listed = json.loads((out / "m.quarot.json").read_text())["beside"]
    assert listed["model"] == "m.onnx"
    assert set(listed["companions"]) == {"tokenizer.json", "merges.txt"}
    (source.parent / "config.json").write_text("newer")
    (source.parent / "merges.txt").write_text("newer")
    assert "replace config.json in" in refusal(source, out / "m.onnx")


def test_what_an_earlier_run_wrote_is_replaced_unless_it_was_changed(source, out):
    for text in ("second", "third"):
        save(source, out / "m.onnx")
        (source.parent / "config.json").write_text(text)
    save(source, out / "m.onnx")
    assert (out / "config.json").read_text() == "third"
    (out / "config.json").write_text("edited by hand")
    assert "replace config.json in" in refusal(source, out / "m.onnx")
    (source.parent / "config.json").write_text("edited by hand")
    save(source, out / "m.onnx")


def test_companions_of_two_outputs_are_replaced_by_neither(source, out):
    save(source, out / "a.onnx")
    save(source, out / "b.onnx")
    (source.parent / "tokenizer.json").write_text("newer")
    assert "replace tokenizer.json in" in refusal(source, out / "b.onnx")
    assert "replace tokenizer.json in" in refusal(source, out / "a.onnx")
    (out / "b.onnx").unlink()
    save(source, out / "a.onnx")
    assert (out / "tokenizer.json").read_text() == "newer"


def test_the_genai_config_of_another_model_in_the_folder_stays(source, out):
    (source.parent / "genai_config.json").write_text('{"model": {"decoder": {"filename": "in.onnx"}}}')
    save(source, out / "a.onnx")
    assert "replace genai_config.json in" in refusal(source, out / "b.onnx")
    save(source, out / "a.onnx")
    assert json.loads((out / "genai_config.json").read_text())["model"]["decoder"]["filename"] == "a.onnx"


def test_a_report_of_something_else_stays(source, out):
    (out / "m.quarot.json").write_text('{"my": "notes"}')
    assert "m.quarot.json" in refusal(source, out / "m.onnx")
    (out / "m.quarot.json").write_text(json.dumps({"beside": {"model": "m.ort", "companions": {}}}))
    assert "m.quarot.json" in refusal(source, out / "m.onnx")
    (out / "m.quarot.json").write_text(json.dumps({"version": "0.0.9", "rotation": {}}))  # of a version without lists
    save(source, out / "m.onnx")


def test_the_data_file_of_another_model_stays(source, out):
    io_models.write(io_models.linear_model(), out / "other.onnx", data="m.onnx.data")
    (out / "m.onnx").write_text("named")
    assert "replace m.onnx.data in" in refusal(source, out / "m.onnx", use_external_data=True)
    (out / "other.onnx").unlink()
    save(source, out / "m.onnx", use_external_data=True)


def test_a_data_file_whose_model_is_not_there_stays(source, out):
    (out / "m.onnx.data").write_text("whose?")
    assert "replace m.onnx.data in" in refusal(source, out / "m.onnx", use_external_data=True)
    save(source, out / "m.onnx", use_external_data=True, overwrite=True)
    (out / "m.onnx").unlink()
    save(source, out / "m.onnx", use_external_data=True)  # the record says whose


def test_a_model_that_was_named_is_replaced_with_its_data(source, out):
    io_models.write(io_models.linear_model(io_models.weights(7)), out / "m.onnx", data="m.onnx.data")
    (out / "notes.txt").write_text("mine")
    save(source, out / "m.onnx", use_external_data=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_inputs_are_spared_even_when_all_may_be_replaced(source):
    before = io_models.tree(source.parent)
    with pytest.raises(OutputError, match="would overwrite the input"):
        save(source, source, overwrite=True)
    assert io_models.tree(source.parent) == before


def test_records_that_are_no_records_protect_nothing_and_open_nothing(source, out):
    for text in ("[]", "{", '{"beside": 1}', '{"beside": {"model": "x.onnx"}}'):
        (out / "x.quarot.json").write_text(text)
        assert Earlier.at(out / "x.onnx").own is None
    with pytest.raises(OutputError, match=r"x\.quarot\.json"):
        Earlier.at(out / "x.onnx").check(Outputs(out / "x.onnx", report=out / "x.quarot.json"))
