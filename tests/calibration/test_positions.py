"""How many positions a model has room for: what its files say, and what its tables have rows for."""

import json
from pathlib import Path

import learned_positions as learned
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny_decoders as tiny
from exports import EXPORTS
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.positions import Positions, positions_of
from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.errors import CalibrationError
from quarot_onnx.io import model_io

ROWS = 20


def found(path: Path) -> Positions | None:
    return positions_of(path.parent, model_io.load(path).graph)


@pytest.mark.parametrize("way", learned.WAYS)
def test_a_table_of_learned_positions_is_found(way: str, tmp_path: Path) -> None:
    """As many tokens as it tells of can be run, and not one more."""
    path = learned.write(tmp_path, ROWS, way)
    positions = found(path)
    assert positions is not None
    assert positions.count == positions.rows == learned.positions(ROWS, way)
    assert "rows of the table that node_position" in positions.why
    session, inputs = ort.InferenceSession(path), ModelInputs.from_path(path)
    session.run(None, inputs.feed(np.full((1, positions.count), 5)))
    with pytest.raises(Exception, match=r"node_position|node_x0|node_taken"):
        session.run(None, inputs.feed(np.full((1, positions.count + 1), 5)))


@pytest.mark.parametrize("case", ["genai", "genai RoPE outside", "opset 23 operators", "optimum llama"])
def test_tables_for_rope(case: str, tmp_path: Path) -> None:
    """Without the files beside the model; where cosines are computed, there is no end."""
    graph = model_io.load(EXPORTS[case]()).graph
    positions = positions_of(tmp_path, graph)
    if case.startswith("optimum"):
        assert positions is None
    else:
        assert positions == Positions(128, "rows of its tables for RoPE", 128)


def test_tables_of_something_else(tmp_path: Path) -> None:
    """What is looked up by ids, by differences of positions or by clipped ones is no table of positions."""
    path = learned.write(tmp_path, ROWS)
    model = onnx.load(path)
    del model.graph.input[-1]
    for node in model.graph.node:
        if "position_ids" in node.input:
            node.input[1] = "index"
    names = {value.name for value in model.graph.initializer}
    for name, value in {"low": np.array(0), "high": np.array(ROWS - 1)}.items():
        assert name not in names
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    other = helper.make_node("Sub", ["counted", "counted"], ["index"], name="index")
    clipped = helper.make_node("Clip", ["counted", "low", "high"], ["index"], name="index")
    place = next(i for i, node in enumerate(model.graph.node) if node.output[0] == "counted") + 1
    for node in (other, clipped):
        variant = onnx.ModelProto()
        variant.CopyFrom(model)
        variant.graph.node.insert(place, node)
        onnx.save(variant, path)
        assert found(path) is None
    model.graph.input.append(helper.make_tensor_value_info("token_type_ids", TensorProto.INT64, ["b", "s"]))
    next(node for node in model.graph.node if "index" in node.input).input[1] = "token_type_ids"
    onnx.save(model, path)
    assert found(path) is None


@pytest.mark.parametrize("numbers", [np.zeros(ROWS, np.int64), np.arange(ROWS) % 5, np.arange(ROWS)[::-1].copy()])
def test_a_constant_that_is_cut_must_count(numbers: np.ndarray, tmp_path: Path) -> None:
    """BERT's types of tokens, and buckets of distances, are cut to the length of the text as well."""
    path = learned.write(tmp_path, ROWS, "cut")
    model = onnx.load(path)
    next(tensor for tensor in model.graph.initializer if tensor.name == "all").CopyFrom(
        numpy_helper.from_array(numbers, "all")
    )
    onnx.save(model, path)
    assert found(path) is None


def with_index(path: Path, *nodes: onnx.NodeProto) -> Path:
    """The table is looked up by what the last of the nodes makes of ``counted``."""
    model = onnx.load(path)
    gather = next(node for node in model.graph.node if node.output[0] == "position")
    gather.input[1] = nodes[-1].output[0]
    place = list(model.graph.node).index(gather)
    for node in nodes[::-1]:
        model.graph.node.insert(place, node)
    onnx.save(model, path)
    return path


def test_a_choice_counts_where_all_of_it_does(tmp_path: Path) -> None:
    path = learned.write(tmp_path, ROWS, "range")
    some = helper.make_node("Greater", ["counted", "step"], ["some"])
    path = with_index(path, some, helper.make_node("Where", ["some", "counted", "step"], ["index"]))
    positions = found(path)
    assert positions is not None
    assert positions.count == ROWS
    flat = helper.make_node("Squeeze", ["input_ids"], ["flat"])
    path = with_index(path, flat, helper.make_node("Where", ["some", "counted", "flat"], ["mixed"]))
    assert found(path) is None


def test_long_ways_of_an_index_take_no_time(tmp_path: Path) -> None:
    chain = [helper.make_node("Max", [f"x{i}" if i else "counted"] * 2, [f"x{i + 1}"]) for i in range(60)]
    path = with_index(learned.write(tmp_path, ROWS, "range"), *(renamed(node) for node in chain))
    positions = found(path)
    assert positions is not None
    assert positions.count == ROWS


def renamed(node: onnx.NodeProto) -> onnx.NodeProto:
    """With values of names of its own."""
    for names in (node.input, node.output):
        names[:] = [name if name == "counted" else f"index.{name}" for name in names]
    return node


@pytest.mark.parametrize(("stated", "count"), [(15, 15), (20, 20), (50, 20)])
def test_the_fewer_of_what_a_config_says_and_a_table_has(stated: int, count: int, tmp_path: Path) -> None:
    path = learned.write(tmp_path, ROWS)
    (tmp_path / "config.json").write_text(json.dumps({"n_positions": stated}))
    positions = found(path)
    assert positions is not None
    assert (positions.count, positions.rows) == (count, 20)
    assert ("n_positions in config.json" in positions.why) == (stated <= 20)


def test_a_prefix_takes_some() -> None:
    positions = Positions(20, "rows", 24)
    assert positions.behind(0) is positions
    assert positions.behind(3) == Positions(17, "rows, without 3 for its prefix", 21)
    assert positions.behind(40).count == 1


def test_windows_that_are_too_long() -> None:
    """A config may state fewer than there are; behind a table's last row is nothing."""
    assert Positions(20, "stated").note(20, "--length") == ()
    (note,) = Positions(20, "stated").note(21, "--length")
    assert "windows of 21 tokens are longer than the 20 positions" in note
    assert len(Positions(20, "stated", 24).note(24, "--length")) == 1
    with pytest.raises(CalibrationError, match=r"of 25 tokens .* 20 positions .*stated.* use 20 or fewer \(--length\)"):
        Positions(20, "stated", 24).note(25, "--length")


def words(path: Path) -> Path:
    tiny.tokenizer().save(str(path.with_name("tokenizer.json")))
    text = path.with_name("text.txt")
    text.write_text("w5 w6 w7 w9 w3 " * 1000)
    return text


def test_windows_that_nobody_asked_for_fit(tmp_path: Path) -> None:
    path = tiny.save(tiny.build(), tmp_path)
    text = words(path)
    reader = TextReader(path, text, samples=2)
    assert reader.token_windows.shape == (2, 128)
    assert any("windows of 128 tokens: the model has 128 positions (rows of the table" in note for note in reader.notes)
    assert TextReader(path, text, samples=2, held=3).token_windows.shape == (2, 125)
    with pytest.raises(CalibrationError, match=r"windows of 200 tokens .* 128 .*--calib-seq-len; in Python seq_len="):
        TextReader(path, text, samples=2, seq_len=200)
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 40}))
    assert TextReader(path, text, samples=2).token_windows.shape == (2, 40)
    asked = TextReader(path, text, samples=2, seq_len=60)
    assert asked.token_windows.shape == (2, 60)
    assert "longer than the 40 positions" in asked.notes[0]
