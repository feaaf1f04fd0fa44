"""Perplexity of models whose outputs are not the logits of every token."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_decoders as tiny
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.errors import ModelError
from quarot_onnx.evaluation.perplexity import perplexity


def model(folder: Path, change: str) -> Path:
    proto = tiny.build(tiny.Spec(cache=False, positions=False))
    graph, head = proto.graph, proto.graph.node[-1]
    first, hidden = graph.output[0], helper.make_tensor_value_info("h", TensorProto.FLOAT, ["b", "s", tiny.HIDDEN])
    if change.startswith("last"):
        index = np.array(-1 if change == "last squeezed" else [-1])
        graph.initializer.append(numpy_helper.from_array(index, "index"))
        graph.node.insert(len(graph.node) - 1, helper.make_node("Gather", ["h", "index"], ["last"], axis=1))
        head.input[0] = "last"
        shape = ["b", tiny.VOCAB] if change == "last squeezed" else ["b", 1, tiny.VOCAB]
        first.CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape))
    elif change.startswith("no head"):
        graph.node.remove(head)
        first.CopyFrom(hidden)
        if change.endswith("open"):
            first.type.tensor_type.shape.dim[2].dim_param = "width"
        elif change.endswith("named logits"):
            graph.node.append(helper.make_node("Identity", ["h"], ["logits"]))
            first.name = "logits"
    elif change == "value head":
        weights = next(value for value in graph.initializer if value.name == "Wh")
        weights.CopyFrom(numpy_helper.from_array(np.ones((tiny.HIDDEN, 1), np.float32), "Wh"))
        first.type.tensor_type.shape.dim[2].dim_value = 1
    elif change == "hidden states first":
        head.output[0] = first.name = "scores"
        graph.output.insert(0, hidden)
    elif change == "flat":
        graph.initializer.append(numpy_helper.from_array(np.array([-1, tiny.HIDDEN]), "rows"))
        graph.node.insert(len(graph.node) - 1, helper.make_node("Reshape", ["h", "rows"], ["flat"]))
        head.input[0] = "flat"
        first.CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", tiny.VOCAB]))
    onnx.checker.check_model(proto)
    return tiny.save(proto, folder / change.replace(" ", "_"))


def score(path: Path, tmp_path: Path) -> float:
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(" ".join(f"w{2 + i % 30}" for i in range(40)))
    return perplexity(path, tmp_path / "text.txt", tmp_path, seq_len=8, windows=2).perplexity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("last", r"gives logits for 1 of 8 tokens \(output 'logits' \[1, 1, 32\]\), and perplexity needs those of all"),
        ("last squeezed", r"gives logits for 1 of 8 tokens \(output 'logits' \[1, 32\]\)"),
        ("no head", r"has no logits: its output 'h' is 8 wide, the width of its hidden states and a vocabulary of 32"),
        ("no head open", r"has no logits: its output 'h' is 8 wide"),
        ("no head named logits", r"has no logits: its output 'logits' is 8 wide"),
        ("value head", r"has no logits: its output 'logits' is 1 wide, a single column"),
    ],
)
def test_what_cannot_be_scored_is_told(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        score(model(tmp_path, change), tmp_path)


@pytest.mark.parametrize("change", ["hidden states first", "flat"])
def test_logits_of_every_token_are_found(tmp_path: Path, change: str) -> None:
    assert score(model(tmp_path, change), tmp_path) == pytest.approx(score(model(tmp_path, ""), tmp_path), rel=1e-6)
