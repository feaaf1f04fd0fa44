"""Graphs of a few Linears, and how to run and look at what becomes of them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.processor import EXACT_PRODUCTS

FLOATS = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
IN, HIDDEN, OUT = 16, 24, 8


def weights(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    shapes = {"W1": (IN, HIDDEN), "b1": (HIDDEN,), "W2": (HIDDEN, OUT)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["W1"] *= np.geomspace(0.01, 1, HIDDEN, dtype=np.float32)  # columns of very different size
    arrays["W2"] += np.float32(0.5)  # not symmetric
    return arrays


def two_linears(*, opset: int = 17, dtype: int = TensorProto.FLOAT, rank: int = 3, seed: int = 0) -> onnx.ModelProto:
    """``y = relu(x W1 + b1) W2``, the nodes named up and down."""
    dims = ["b", "s", IN][3 - rank :]
    nodes = [
        helper.make_node("MatMul", ["x", "W1"], ["p"], name="up"),
        helper.make_node("Add", ["p", "b1"], ["h0"], name="bias"),
        helper.make_node("Relu", ["h0"], ["h"], name="relu"),
        helper.make_node("MatMul", ["h", "W2"], ["y"], name="down"),
    ]
    return model(nodes, {"x": dims}, {"y": [*dims[:-1], OUT]}, weights(seed), opset=opset, dtype=dtype)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    constants: dict[str, NDArray[Any]],
    *,
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A checked model; float constants are cast to ``dtype``, an input named ids is int64."""
    kind = FLOATS[dtype]
    cast = {n: a.astype(kind) if np.issubdtype(a.dtype, np.floating) else a for n, a in constants.items()}
    graph = helper.make_graph(
        list(nodes),
        "linears",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64 if name == "ids" else dtype, shape)
            for name, shape in inputs.items()
        ],
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in cast.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(made)
    return made


def run(
    given: onnx.ModelProto | ir.Model | Path, feeds: dict[str, NDArray[Any]], optimized: Path | None = None
) -> NDArray[Any]:
    """The first output; with ``optimized`` onnxruntime writes the graph that it really runs.

    Weight-only graphs run as MatMulNBits, which would round activations to 8 bits too (accuracy level 4). Products are
    exact on every processor: what is tested is what the graph means.
    """
    options = ort.SessionOptions()
    options.add_session_config_entry(EXACT_PRODUCTS, "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if isinstance(given, ir.Model):
        given = ir.to_proto(given)
    source = str(given) if isinstance(given, Path) else given.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def operators(path: Path) -> Counter[str]:
    """The operators of a graph, counted; no weight is read."""
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def dequantized(made: onnx.ModelProto | ir.Model, node: str) -> NDArray[np.float32]:
    """What the DequantizeLinear before input 1 of the MatMul ``node`` gives: the weight that the model really has."""
    proto = ir.to_proto(made) if isinstance(made, ir.Model) else made
    return numpy_grid_inverse(*weight_grid(proto, node))


def numpy_grid_inverse(integers: NDArray[Any], scale: NDArray[np.float32], zero: NDArray[Any]) -> NDArray[np.float32]:
    return (integers.astype(np.float32) - zero.astype(np.float32)) * scale


def weight_grid(proto: onnx.ModelProto, node: str) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[Any]]:
    """Integers, scale and zero point of the weight of a MatMul."""
    return _grid(proto, node, 1)


def activation_grid(proto: onnx.ModelProto, node: str) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Scale and zero point of the Q/DQ before a MatMul."""
    return _grid(proto, node, 0)[1:]


def _grid(proto: onnx.ModelProto, node: str, index: int) -> tuple[Any, Any, Any]:
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    producers = {output: maker for maker in proto.graph.node for output in maker.output}
    matmul = next(n for n in proto.graph.node if n.op_type == "MatMul" and n.name.startswith(node))
    dequantize = producers[matmul.input[index]]
    if dequantize.op_type == "Cast":
        dequantize = producers[dequantize.input[0]]
    assert dequantize.op_type == "DequantizeLinear", dequantize.op_type
    return tuple(arrays.get(name) for name in dequantize.input)
