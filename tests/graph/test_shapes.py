"""Shapes: those that onnx-ir's own pass finds, without a look at a large weight and with the graph left as it is."""

import logging
from typing import NoReturn

import exports
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.io import model_io


@pytest.mark.parametrize("export", ["optimum llama", "optimum gpt_neox", "dynamo cache", "dynamo 23", "genai fp16"])
def test_what_the_pass_finds_is_found(export: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_io.load(exports.EXPORTS[export]())
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.nbytes > 1000:
            value.const_value = model_io.lazy_tensor(
                _never, dtype=value.const_value.dtype, shape=value.const_value.shape, name=value.name
            )
    before = [_written(output) for node in model.graph for output in node.outputs]
    shapes = Shapes(model)
    assert before == [_written(output) for node in model.graph for output in node.outputs]

    probe = model.clone()
    monkeypatch.setattr(logging.getLogger("onnx_ir.passes.common.shape_inference"), "level", logging.CRITICAL)
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(probe)
    known = 0
    for node, same in zip(model.graph, probe.graph, strict=True):
        for value, wanted in zip(node.outputs, same.outputs, strict=True):
            if wanted.shape is not None:
                assert shapes.of(value) == tuple(d if isinstance(d, int) else None for d in wanted.shape)
                known += 1
            if wanted.dtype is not None:
                assert shapes.dtype(value) == wanted.dtype
    assert known > 10


def _written(value: ir.Value) -> tuple[str | None, str, str]:
    return value.name, str(value.type), str(value.shape)


def _never() -> NoReturn:
    raise AssertionError("a weight was read")
