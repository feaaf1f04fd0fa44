"""A tiny model with an attention sink: its BOS makes the down projections' inputs some hundred times as large."""

from pathlib import Path

import exports
import onnx
from onnx import numpy_helper

from quarot_onnx.graph.linear import linears
from quarot_onnx.io import model_io

SINK = 256  # the BOS of the tiny models' tokenizer
INTERMEDIATE = 96


def plant(exporter: str, folder: Path) -> Path:
    source = exports.optimum_export("llama") if exporter == "optimum" else exports.genai_like(tied_transposed=False)
    for file in source.parent.iterdir():
        if file.suffix != ".onnx" and not file.name.endswith(".data"):
            (folder / file.name).write_bytes(file.read_bytes())
    wide = {
        linear.weight.value.name
        for linear in linears(model_io.load(source).graph)
        if linear.out_features == INTERMEDIATE
    }
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if tensor.name.endswith("embed_tokens.weight"):
            array[SINK] = 0
            array[SINK, 0] = 40  # one channel alone, so that a norm makes it as large as it can be
        elif tensor.name in wide:
            array[0] *= 6
        else:
            continue
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"
