"""Which axes a FusedMatMul pairs, and its shape, judged by what onnxruntime computes."""

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from quarot_onnx.graph.products import operand_axis
from quarot_onnx.graph.query import data_input
from quarot_onnx.graph.shapes import Shapes

FLAGS = [
    dict(zip(("transA", "transBatchA", "transB", "transBatchB"), f, strict=True))
    for f in itertools.product((0, 1), repeat=4)
]
SIZES = {"A": (2, 3, 5, 7), "B": (2, 3, 7, 11)}  # as the product takes them


def stored(flags: dict[str, int], side: str) -> tuple[int, ...]:
    """The shape that the node reads, where the product takes ``SIZES``."""
    b1, b2, rows, columns = SIZES[side]
    if flags[f"trans{side}"]:
        rows, columns = columns, rows
    return (rows, b1, b2, columns) if flags[f"transBatch{side}"] else (b1, b2, rows, columns)


def product(flags: dict[str, int], declared: bool = True) -> Any:
    shapes = {side: stored(flags, side) for side in "AB"}
    node = helper.make_node("FusedMatMul", ["A", "B"], ["y"], domain="com.microsoft", alpha=0.5, **flags)
    relu = helper.make_node("Relu", ["y"], ["z"])
    inputs = [helper.make_tensor_value_info(s, TensorProto.FLOAT, shapes[s] if declared else None) for s in "AB"]
    outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node, relu], "product", inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "".join(map(str, flags.values())))
def test_axes_and_shape(flags: dict[str, int]) -> None:
    proto = product(flags)
    feeds = {side: np.random.default_rng(0).random(stored(flags, side)).astype(np.float32) for side in "AB"}
    result = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    model = ir.from_proto(proto)
    node, shapes = model.graph[0], Shapes(model)
    assert shapes.of(node.outputs[0]) == result.shape == (2, 3, 5, 11)
    assert shapes.of(model.graph.outputs[0]) == result.shape
    for index, axis in itertools.product((0, 1), (-1, -2)):
        found = operand_axis(node, index, axis, shapes)
        assert found is not None
        # All sizes but the batch's differ, so a length tells the axis.
        assert stored(flags, "AB"[index])[found] == SIZES["AB"[index]][axis]


def test_the_first_axis_of_an_operand_of_unknown_rank() -> None:
    model = ir.from_proto(product({"transA": 1, "transBatchA": 1, "transB": 0, "transBatchB": 1}, declared=False))
    node, shapes = model.graph[0], Shapes(model)
    assert operand_axis(node, 0, -1, shapes) is None
    assert operand_axis(node, 0, -2, shapes) == -1
    assert operand_axis(node, 1, -1, shapes) == -1


@pytest.mark.parametrize(
    ("op", "domain", "operands", "outputs"),
    [
        ("QuickGelu", "com.microsoft", ["x"], ["y"]),
        ("BiasGelu", "com.microsoft", ["x", "b"], ["y"]),
        ("SimplifiedLayerNormalization", "", ["x", "b"], ["y"]),
        ("SkipSimplifiedLayerNormalization", "com.microsoft", ["x", "x", "b"], ["n", "", "", "y"]),
        ("SkipLayerNormalization", "com.microsoft", ["x", "x", "b"], ["y"]),
    ],
)
def test_shapes_go_on_behind_what_the_optimizer_made(op, domain, operands, outputs) -> None:
    nodes = [
        helper.make_node(op, operands, outputs, domain=domain),
        helper.make_node("Transpose", ["y"], ["z"], perm=[0, 2, 1]),
    ]
    values = {"x": [1, 5, 8], "b": [8]}
    graph = helper.make_graph(
        nodes,
        "fused",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    before = ir.to_proto(model).SerializeToString()
    shapes = Shapes(model)
    assert shapes.of(model.graph.outputs[0]) == (1, 8, 5)
    assert shapes.of(data_input(model.graph[1])) == (1, 5, 8)
    assert ir.to_proto(model).SerializeToString() == before
