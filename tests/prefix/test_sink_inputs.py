"""Where a sink is looked for: at inputs of Linears that have a row for each token."""

from pathlib import Path

import exports
import numpy as np
import onnx
import pytest
from command_line import Shell
from lowbit_runs import text_reader
from onnx import helper, numpy_helper
from planted_sink import SINK, plant

from quarot_onnx import QConfig, QLayerConfig, SinkPrefixConfig, UInt8Spec
from quarot_onnx.config import Int8Spec
from quarot_onnx.errors import CalibrationError, ConfigError
from quarot_onnx.graph.linear import linears
from quarot_onnx.graph.routing import routed_values
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.pipeline import quantize
from quarot_onnx.prefix.sinks import Sinks

FEW = ("--calib-samples", 4, "--calib-seq-len", 65)


@pytest.fixture(params=["Slice", "Gather"])
def last(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model with a sink whose head reads the last token alone, on an axis of its own or on none."""
    (tmp_path / "source").mkdir()
    path = plant("optimum", tmp_path / "source")
    model = onnx.load(path)
    graph = model.graph
    head = next(node for node in graph.node if "logits" in node.output)
    sliced = request.param == "Slice"
    numbers = {"first": [-1], "end": [2**31], "axis": [1]} if sliced else {"last": -1}
    graph.initializer.extend(numpy_helper.from_array(np.array(n, np.int64), name) for name, n in numbers.items())
    axis = {} if sliced else {"axis": 1}
    node = helper.make_node(request.param, [head.input[0], *numbers], ["last_hidden"], name="last_hidden", **axis)
    graph.node.insert(list(graph.node).index(head), node)
    head.input[0] = "last_hidden"
    logits = next(value for value in graph.output if value.name == "logits").type.tensor_type.shape
    if sliced:
        logits.dim[1].Clear()
        logits.dim[1].dim_value = 1
    else:
        del logits.dim[1]
    del graph.value_info[:]
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("memory", [WHOLE, Memory(300_000, by_stages=True)], ids=["whole", "pieces"])
def test_an_input_of_the_last_token_alone(memory: Memory, last: Path) -> None:
    reader, model = text_reader(last, 4, 65), model_io.load(last)
    names = [linear.input.name for linear in linears(model.graph)]
    assert "last_hidden" in names
    found = Sinks(model, reader.inputs, names, [reader.token_windows], memory=memory).search(4)
    assert [loss.ids for loss in found] == [(), (SINK,)]
    alone = Sinks(model, reader.inputs, ["last_hidden"], [reader.token_windows], memory=memory)
    with pytest.raises(CalibrationError, match="where there is a row for each token, and 'last_hidden' has none: name"):
        alone.search(4)


def test_a_head_that_reads_the_last_token(last: Path, shell: Shell, tmp_path: Path) -> None:
    shown = shell.ok("inspect", last, "--sinks", "--json").json["sinks"]
    assert [entry["prefix"] for entry in shown] == [[], [SINK]]
    small = ("--scheme", "w8a8-static", "--no-check", *FEW)
    for form in ("graph", "auto", "npz"):
        told = shell.ok("quantize", last, tmp_path / form / "m.onnx", *small, "--prefix", form)
        assert f"sink prefix [{SINK}]: without it peaks up to" in told.err


def test_the_proof_of_such_a_head(last: Path, shell: Shell, tmp_path: Path) -> None:
    """Its logits hold nothing of the prefix that could be cut off."""
    shell.ok("rotate", last, tmp_path / "m.onnx", "--prefix-ids", f"{SINK},9")
    shell.ok("verify", last, tmp_path / "m.onnx")


@pytest.mark.parametrize("form", ["graph", "auto"])
def test_where_experts_alone_have_fixed_scales(form: str, tmp_path: Path) -> None:
    """They see some tokens alone, so that the inputs of all other Linears tell."""
    source = exports.EXPORTS["optimum MoE"]()
    graph, reader = model_io.load(source).graph, text_reader(source, 4, 65)
    routed = {value.name for value in routed_values(graph)}
    names = [linear.name for linear in linears(graph) if linear.input.name in routed]
    config = QConfig(
        QLayerConfig(UInt8Spec(), Int8Spec()), nodes_to_quantize=names, algo_config=[SinkPrefixConfig(form=form)]
    )
    arguments = (source, tmp_path / "m.onnx", config, reader)
    if form == "graph":
        with pytest.raises(ConfigError, match=r"no token stands out \(peaks up to"):
            quantize(*arguments, check=None)
    else:
        assert any(note.startswith("no sink prefix: no token") for note in quantize(*arguments, check=None).notes)
    experts = [linear.input.name for linear in linears(graph) if linear.name in names]
    others = [linear.input.name for linear in linears(graph) if linear.name not in names]
    one, other = (Sinks(model_io.load(source), reader.inputs, of, [reader.token_windows]) for of in (experts, others))
    assert one.loss((SINK,)) == other.loss((SINK,))
