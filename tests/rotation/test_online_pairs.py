"""An online Hadamard before any Linear with a constant weight, in graphs that are no decoders."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.errors import ConfigError
from quarot_onnx.graph.linear import linears
from quarot_onnx.io import model_io
from quarot_onnx.rotation.apply import apply_plan
from quarot_onnx.rotation.plan import OnlineEdit, Plan, RotationRequest, plan_rotation
from quarot_onnx.sites.detect import detect
from quarot_onnx.sites.model import OnlinePair

# One product of n float32 terms in another order: n = 296 roundings of 6e-8 at most, their random sum far less.
RTOL = 1e-5
GEMMS = [
    {},
    {"transB": 1},
    {"transA": 1},
    {"transA": 1, "transB": 1},
    {"alpha": 0.5, "beta": 3.0},
    {"transA": 1, "transB": 1, "alpha": -2.0, "beta": 0.5},
]


def write(folder: Path, size: int, *, gemm: dict | None, dtype: type = np.float32, bias: bool = True) -> Path:
    """``y = Linear(x)`` of ``[rows, size]`` (a Gemm) or ``[batch, rows, size]`` (a MatMul) to five features."""
    rng = np.random.default_rng(size)
    weight = (rng.standard_normal((size, 5)) * size**-0.5).astype(dtype)
    attributes = gemm or {}
    shape: list[int | str] = ["b", "s", size]
    if gemm is not None:
        shape = [size, "s"] if attributes.get("transA") else ["s", size]
    result: list[int | str] = ["b", "s", 5] if gemm is None else ["s", 5]
    constants = {"w": weight.T.copy() if attributes.get("transB") else weight, "c": np.ones(5, dtype)}
    inputs = ["x", "w", "c"] if bias and gemm is not None else ["x", "w"]
    op = "MatMul" if gemm is None else "Gemm"
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"], name="linear", **attributes)],
        "g",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)],
        [helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), result)],
        [numpy_helper.from_array(constants[name], name) for name in inputs[1:]],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def rotate(source: Path, *, block_size: int | None = None) -> tuple[Path, Plan]:
    model = model_io.load(source)
    pairs = tuple(OnlinePair(linear, block_size) for linear in linears(model.graph))
    plan = plan_rotation(replace(detect(model), online_pairs=pairs), RotationRequest({}))
    apply_plan(model, plan)
    target = source.with_name("rotated.onnx")
    model_io.save(model, target)
    return target, plan


def outputs(path: Path, x: NDArray) -> NDArray[np.float64]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0], dtype=np.float64)


def check(source: Path, target: Path, x: NDArray, rtol: float = RTOL) -> None:
    before, after = outputs(source, x), outputs(target, x)
    assert before.shape == after.shape
    assert np.abs(after - before).max() < rtol * np.abs(before).max()
    a, b = (onnx.load(path) for path in (source, target))
    weights = [next(t for t in m.graph.initializer if t.name == "w") for m in (a, b)]
    assert weights[0].dims == weights[1].dims
    assert weights[0].raw_data != weights[1].raw_data
    onnx.checker.check_model(b, full_check=True)
    assert [(o.domain, o.version) for o in b.opset_import] == [("", 17)]
    assert b.ir_version == 8


@pytest.mark.parametrize("attributes", GEMMS, ids=str)
def test_gemm(attributes: dict, tmp_path: Path) -> None:
    source = write(tmp_path, 24, gemm=attributes)
    target, plan = rotate(source)
    x = np.random.default_rng(0).standard_normal((24, 7) if attributes.get("transA") else (7, 24)).astype(np.float32)
    check(source, target, x)
    assert plan.counts == {"online_pairs": 1}
    assert plan.notes == ()


@pytest.mark.parametrize("size", [12, 148, 296, 576, 1776])
def test_matmul_of_any_rank_and_size(size: int, tmp_path: Path) -> None:
    """148 and 296 are irreducible; 576 = 24·24 and 1776 = 148·12 take two factors."""
    source = write(tmp_path, size, gemm=None)
    target, plan = rotate(source)
    rotation = next(iter(plan.rotations.values()))
    assert (rotation.size, rotation.block_size) == (size, None)
    check(source, target, np.random.default_rng(1).standard_normal((2, 3, size)).astype(np.float32))


def test_three_factors(tmp_path: Path) -> None:
    """The axes before the last two are mixed one at a time, all of them here by unsymmetric matrices."""
    source = write(tmp_path, 6912, gemm=None)
    model = model_io.load(source)
    linear = next(linears(model.graph))
    plan = plan_rotation(replace(detect(model), online_pairs=(OnlinePair(linear),)), RotationRequest({}))
    narrow = plan.rotations["pair[6912]"].online(24)
    assert len(narrow.factors) == 3
    assert not any(np.array_equal(factor, factor.T) for factor in narrow.factors)
    assert narrow.weight_scale == next(e for e in plan.edits if isinstance(e, OnlineEdit)).factors.weight_scale
    edits = tuple(replace(edit, factors=narrow) if isinstance(edit, OnlineEdit) else edit for edit in plan.edits)
    apply_plan(model, replace(plan, edits=edits))
    model_io.save(model, tmp_path / "rotated.onnx")
    x = np.random.default_rng(2).standard_normal((1, 3, 6912)).astype(np.float32)
    check(source, tmp_path / "rotated.onnx", x)


@pytest.mark.parametrize(("size", "block"), [(92, 4), (116, 4), (668, 4)])
def test_a_size_without_a_hadamard_falls_back_to_blocks_and_says_so(size: int, block: int, tmp_path: Path) -> None:
    source = write(tmp_path, size, gemm={})
    target, plan = rotate(source)
    assert next(iter(plan.rotations.values())).block_size == block
    missing = f"no Hadamard matrix of order {size} that this tool can build"
    assert plan.notes == (f"pair[{size}]: {missing}; block-diagonal with blocks of {block} instead",)
    check(source, target, np.random.default_rng(3).standard_normal((5, size)).astype(np.float32))


def test_a_block_size_of_ones_own(tmp_path: Path) -> None:
    source = write(tmp_path, 48, gemm=None)
    target, plan = rotate(source, block_size=12)
    assert plan.rotations["pair[48/12]"].block_size == 12
    check(source, target, np.random.default_rng(4).standard_normal((2, 3, 48)).astype(np.float32))


@pytest.mark.parametrize("size", [37, 74])
def test_a_size_without_blocks_worth_having_is_an_error(size: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"online_pairs: linear: no Hadamard matrix of order {size} is known"):
        rotate(write(tmp_path, size, gemm={}))


def test_float16(tmp_path: Path) -> None:
    source = write(tmp_path, 296, gemm=None, dtype=np.float16)
    target, _ = rotate(source)
    x = np.random.default_rng(5).standard_normal((2, 3, 296)).astype(np.float16)
    # Two roundings of 2^-11 to each of the activations and weights, and the output's own.
    check(source, target, x, rtol=4 * 2**-11)
    weight = next(t for t in onnx.load(target).graph.initializer if t.name == "w")
    assert weight.data_type == TensorProto.FLOAT16
