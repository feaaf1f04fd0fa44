"""Tiny seeded models for the tests of reading and writing."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Two matrices of 4 KiB, a vector below the 1 KiB that stays inline."""
    rng = np.random.default_rng(seed)
    return {
        "first": rng.standard_normal((32, 32)).astype(np.float32),
        "second": rng.standard_normal((32, 32)).astype(np.float32),
        "bias": rng.standard_normal(32).astype(np.float32),
    }


def linear_model(arrays: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
    """``y = (x @ first) @ second + bias`` with inline weights."""
    arrays = weights() if arrays is None else arrays
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["h"], name="mm1"),
        helper.make_node("MatMul", ["h", "second"], ["g"], name="mm2"),
        helper.make_node("Add", ["g", "bias"], ["y"], name="add"),
    ]
    return model_of(nodes, [numpy_helper.from_array(array, name) for name, array in arrays.items()])


def model_of(
    nodes: list[onnx.NodeProto],
    initializers: list[onnx.TensorProto],
    *,
    elem_type: int = TensorProto.FLOAT,
    functions: list[onnx.FunctionProto] | None = None,
    opsets: list[onnx.OperatorSetIdProto] = OPSETS,
) -> onnx.ModelProto:
    """A model from ``x: [n, 32]`` to ``y: [n, 32]``."""
    x, y = (helper.make_tensor_value_info(name, elem_type, ["n", 32]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "tiny", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=opsets, functions=functions or [], ir_version=10)


def write(model: onnx.ModelProto, path: Path, *, data: str | None = None) -> Path:
    """Save a model with onnx itself, with every tensor from 1 KiB on in the file ``data`` if that is named."""
    if data is None:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=1024)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder below ``folder``; files with their digest."""
    return {str(p.relative_to(folder)): digest(p) if p.is_file() else "folder" for p in sorted(folder.rglob("*"))}
