"""Decoders without a language model's head: embeddings and scores of labels, whose vocabulary the table tells."""

import shutil
from collections.abc import Callable
from pathlib import Path

import exports
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command_line import Shell
from onnx import numpy_helper

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.inputs import TensorSpec, find_logits, no_logits


def edited(folder: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    """optimum's llama, changed."""
    shutil.copytree(exports.EXPORTS["optimum llama"]().parent, folder)
    model = onnx.load(folder / "model.onnx")
    edit(model)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def _embeddings(model: onnx.ModelProto) -> None:
    """As for feature extraction: the last norm's output in place of logits, and no cache to go on with."""
    head = next(node for node in model.graph.node if node.output[0] == "logits")
    state = head.input[0]
    model.graph.node.remove(head)
    while len(model.graph.output):
        model.graph.output.pop()
    shape = ["batch_size", "sequence_length", 64]
    model.graph.output.append(onnx.helper.make_tensor_value_info(state, onnx.TensorProto.FLOAT, shape))


def _labels(model: onnx.ModelProto) -> None:
    """As for the classification of tokens: five columns in place of the vocabulary."""
    head = next(node for node in model.graph.node if node.output[0] == "logits")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == head.input[1])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:, :5].copy(), weight.name))
    logits = next(value for value in model.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[2].dim_value = 5


EDITS = {"embeddings": (_embeddings, "64 wide, the width of its hidden states"), "labels": (_labels, "5 wide, labels")}


@pytest.mark.parametrize("kind", EDITS)
def test_they_are_quantized_and_said_to_predict_nothing(kind: str, shell: Shell, text: Path, tmp_path: Path) -> None:
    edit, why = EDITS[kind]
    path = edited(tmp_path / "model", edit)
    inputs = ModelInputs.from_path(path)
    assert inputs.vocab_size == exports.VOCAB
    assert why in inputs.no_logits
    few = ("--calib-text", text, "--calib-samples", 2, "--calib-seq-len", 32)
    for number, words in enumerate(([], ["--scheme", "w8a8-static", *few], ["--scheme", "w4a16", *few])):
        told = shell.ok("quantize", path, tmp_path / str(number) / "model.onnx", *words, "--json").json
        proof = told["equivalence"]
        assert proof is not None or kind == "embeddings", "whose last norm stands in the way of R1"
        assert proof is None or (proof["passed"] and proof["kl"] is None)
        assert sum(f"not checked: {path} has no predictions to compare: its output" in n for n in told["notes"]) == 1
    other = tmp_path / "0" / "model.onnx"
    for words in (("compare", path, other), ("evaluate", path, "--text", text), ("generate", path, "--prompt", "a")):
        assert why in shell.fails(*words)
    assert why in shell.fails("quantize", path, tmp_path / "no.onnx", "--max-kl", 0.1)


def test_a_head_of_as_many_labels_as_another_table_has_rows(tmp_path: Path) -> None:
    """BERT's two types of tokens, and two labels."""

    def typed(model: onnx.ModelProto) -> None:
        _labels(model)
        graph = model.graph
        graph.initializer.append(numpy_helper.from_array(np.ones((5, 64), np.float32), "types"))
        graph.node.insert(0, onnx.helper.make_node("Gather", ["types", "token_type_ids"], ["typed"]))
        shape = ["batch_size", "sequence_length"]
        graph.input.append(onnx.helper.make_tensor_value_info("token_type_ids", onnx.TensorProto.INT64, shape))

    model = onnx.load(edited(tmp_path / "model", typed))
    inputs = ModelInputs.from_model(ir.from_proto(model), known=False)
    assert inputs.tokens == "input_ids"
    assert inputs.vocab_size == exports.VOCAB


@pytest.mark.parametrize(
    ("width", "table", "why"),
    [
        (264, (264, 64), ""),
        (64, (64, 64), ""),  # a vocabulary as large as the hidden size
        (272, (264, 64), ""),  # a padded head
        (200, (264, 64), ""),  # a head of the frequent tokens
        (64, (264, 64), "the width of its hidden states and a vocabulary of 264 tokens"),
        (2, (264, 64), "labels"),
        (1, None, "a single column"),
        (5, None, ""),
    ],
)
def test_what_a_width_tells(width: int, table: tuple[int, int] | None, why: str) -> None:
    found = no_logits("y", width, table)
    assert why in found
    assert bool(found) == bool(why)


def test_logits_beside_hidden_states_are_found() -> None:
    outputs = [
        TensorSpec(name, ir.DataType.FLOAT, (None, None, width)) for name, width in (("hidden", 64), ("words", 264))
    ]
    assert find_logits(outputs, (264, 64)) == (outputs[1], "")
    assert find_logits(outputs[:1], (264, 64))[0] == outputs[0]
