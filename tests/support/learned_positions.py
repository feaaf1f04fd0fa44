"""The decoder of ``cached_decoder`` with learned positions: a row of a table is added to each embedding."""

from pathlib import Path

import cached_decoder
import numpy as np
import onnx
import tiny_decoders
from onnx import TensorProto, helper, numpy_helper

WAYS = ("ids", "range", "offset", "summed", "stored", "cut", "sliced")
OFFSET = 2


def write(folder: Path, rows: int, way: str = "ids") -> Path:
    """The model with a tokenizer beside it.

    Args:
        folder: Where it is to lie.
        rows: Those of the table.
        way: Rows are taken by ``ids`` (an input), a ``range`` that the graph counts, the same with an ``offset``, a
            mask that is ``summed`` up; the table is ``stored`` as [1, rows, width] in float16, or the numbers are
            ``cut`` out of a constant; or the first rows are ``sliced`` off, in a graph without a cache. ``unseen``:
            by ids, through an operator that nobody looks through.
    """
    model = cached_decoder.build(past=way != "sliced", present=way != "sliced")
    graph, rng = model.graph, np.random.default_rng(7)
    table = rng.standard_normal((rows, cached_decoder.HIDDEN)).astype(np.float32)
    constants = {"wpe": table, "first": np.array(0), "step": np.array(1), "axis1": np.array([1]), "ahead": np.array(-1)}
    constants |= {"axis0": np.array([0]), "offset": np.array(OFFSET), "all": np.arange(rows), "front": np.array([0])}
    constants["one"] = np.array([1])
    nodes = [_made("Shape", ["input_ids"], "seq1", start=1, end=2)]
    if way == "sliced":
        nodes.append(_made("Slice", ["wpe", "front", "seq1", "axis0"], "position"))
    else:
        past = "past_key_values.0.key"
        nodes += [_made("Shape", [past], "past1", start=2, end=3), _made("Add", ["past1", "seq1"], "all1")]
        nodes += [_made("Squeeze", [name], f"{name}_0") for name in ("past1", "all1")]
        nodes.append(_made("Range", ["past1_0", "all1_0", "step"], "counted"))
        index, source = "counted", "wpe"
        if way in ("ids", "unseen"):
            index = "position_ids"
            graph.input.append(helper.make_tensor_value_info(index, TensorProto.INT64, ["b", "s"]))
            if way == "unseen":
                nodes.append(_made("Abs", ["position_ids"], index := "positive"))
        elif way == "offset":
            nodes.append(_made("Add", ["counted", "offset"], index := "raised"))
        elif way == "summed":
            graph.input.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["b", "t"]))
            nodes += [
                _made("CumSum", ["attention_mask", "one"], "sums"),
                _made("Mul", ["sums", "attention_mask"], "seen"),
                _made("Sub", ["seen", "step"], "from0"),
                _made("Slice", ["from0", "past1", "all1", "axis1"], "new"),
                _made("Add", ["new", "offset"], index := "raised"),
            ]
        elif way == "cut":
            nodes.append(_made("Slice", ["all", "past1", "all1", "axis0"], index := "taken"))
        elif way == "stored":
            constants["wpe"] = table[None].astype(np.float16)
            nodes.append(_made("Cast", ["wpe"], "wide", to=TensorProto.FLOAT))
            nodes.append(_made("Squeeze", ["wide", "axis0"], source := "table2d"))
        nodes.append(_made("Gather", [source, index], "position"))
    first = next(node for node in graph.node if node.output[0] == "x0")
    first.name, first.output[0] = "embedding", "embedded"
    nodes += [first, _made("Add", ["embedded", "position"], "x0")]
    rest = [node for node in graph.node if node is not first and node.output[0] != "embedded"]
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    used = {name for node in graph.node for name in node.input} - {item.name for item in graph.initializer}
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items() if name in used)
    onnx.checker.check_model(model)
    path = cached_decoder.save(model, folder)
    tiny_decoders.tokenizer(cached_decoder.VOCAB).save(str(folder / "tokenizer.json"))
    return path


def positions(rows: int, way: str) -> int:
    """How many there are."""
    return rows - OFFSET if way in ("offset", "summed") else rows


def _made(kind: str, inputs: list[str], out: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [out], name=f"node_{out}", **attributes)
