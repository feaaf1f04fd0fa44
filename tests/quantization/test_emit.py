"""What is written computes what a NumPy reference of the pattern computes, and onnxruntime fuses it."""

from pathlib import Path

import linear_graphs as graphs
import numpy as np
import onnx_ir as ir
import pytest
import rounded_weights
from onnx import TensorProto, helper

from quarot_onnx.config.choices import OutputFormat
from quarot_onnx.emission.emit import Emitter
from quarot_onnx.emission.formats import StoredWeight
from quarot_onnx.graph.linear import linears
from quarot_onnx.graph.query import Constant, resolve_constant, seen
from quarot_onnx.quantization.activations import Activation, PerToken, Static
from quarot_onnx.quantization.grids import Grid
from quarot_onnx.quantization.scheme import WeightScheme

# One rounding of float32 (6e-8) per operation, sums of at most 24 products of integers are exact: 1e-5 is ample.
# A float16 output is rounded at 2^-11 of its size, its bias once more.
RTOL = {TensorProto.FLOAT: 1e-5, TensorProto.FLOAT16: 2e-3}
TINY = np.float32(1e-30)
COARSE = Grid(np.array(20.0, np.float32), np.array(128, np.uint8))
ACTIVATIONS = [None, PerToken(), Static(COARSE)]


def plain(weight: Constant, alpha: float, **grid: bool) -> StoredWeight:
    return StoredWeight(rounded_weights.nearest(seen(weight, alpha), WeightScheme(8, **grid)), OutputFormat.QDQ)


def quantized(proto, activation: Activation, output: Static | None = None, **grid: bool) -> ir.Model:
    model = ir.from_proto(proto)
    emitter = Emitter(model)
    for linear in list(linears(model.graph)):
        emitter.linear(linear, plain(linear.weight, linear.alpha, **grid), activation, output)
    return model


def per_token(x: np.ndarray) -> np.ndarray:
    """The reference: scale = max|x| / 127 over the last axis, zero point 128."""
    x = x.astype(np.float32)
    amax = np.maximum(np.abs(x).max(axis=-1, keepdims=True), TINY)
    step = np.float32(1 / 127)
    integers = np.clip(np.rint((x / amax) / step) + 128, 0, 255)
    return (integers - 128).astype(np.float32) * step * amax


def fixed(x: np.ndarray, grid: Grid) -> np.ndarray:
    integers = np.clip(np.rint(x.astype(np.float32) / grid.scale) + grid.zero_point, 0, 255)
    return (integers - grid.zero_point).astype(np.float32) * grid.scale


def reference_input(x: np.ndarray, activation: Activation) -> np.ndarray:
    if activation is None:
        return x
    return per_token(x) if isinstance(activation, PerToken) else fixed(x, activation.grid)


def sample(rank: int, dtype: int = TensorProto.FLOAT, seed: int = 1) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((2, 5, graphs.IN)[3 - rank :])
    x *= np.geomspace(1e-3, 1e3, 5)[:, None]  # rows of very different size
    return x.astype(graphs.FLOATS[dtype])


def close(actual: np.ndarray, expected: np.ndarray, rtol: float) -> None:
    """Row by row: a small row must not hide behind a large one."""
    expected = expected.astype(np.float64)
    error = np.abs(actual - expected).max(axis=-1)
    assert (error <= rtol * np.abs(expected).max(axis=-1)).all(), error
    assert expected.std() > 0.1


@pytest.mark.parametrize("dtype", RTOL, ids=["float32", "float16"])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_per_token_is_its_reference_and_fused(opset: int, rank: int, dtype: int, tmp_path: Path) -> None:
    proto = graphs.two_linears(opset=opset, dtype=dtype, rank=rank)
    model, x = quantized(proto, PerToken()), sample(rank, dtype)
    w = {name: array.astype(graphs.FLOATS[dtype]).astype(np.float32) for name, array in graphs.weights().items()}
    w1, w2 = graphs.dequantized(model, "up"), graphs.dequantized(model, "down")
    np.testing.assert_allclose(w1, w["W1"], atol=np.abs(w["W1"]).max(axis=0).max() / 254 * 1.001)
    kind = graphs.FLOATS[dtype]
    hidden = np.maximum(((per_token(x) @ w1).astype(kind) + w["b1"].astype(kind)), 0).astype(kind)
    actual = graphs.run(model, {"x": x}, tmp_path / "o.onnx")
    assert actual.dtype == kind
    if dtype == TensorProto.FLOAT:
        close(actual, per_token(hidden) @ w2, RTOL[dtype])
    else:  # a hidden value that falls on the other side of a rounding moves its integer by one step of 254
        close(actual, per_token(hidden) @ w2, 1 / 127)
    counts = graphs.operators(tmp_path / "o.onnx")
    assert counts["MatMulIntegerToFloat"] == 2
    assert not counts.keys() & {"MatMul", "Gemm", "DequantizeLinear", "FusedMatMul"}


def test_rows_of_zeros_stay_zeros() -> None:
    x = sample(3)
    x[0, 2] = 0
    proto = graphs.model(
        [helper.make_node("MatMul", ["x", "W1"], ["y"], name="up")],
        {"x": ["b", "s", graphs.IN]},
        {"y": ["b", "s", graphs.HIDDEN]},
        {"W1": graphs.weights()["W1"]},
    )
    model = quantized(proto, PerToken())
    actual = graphs.run(model, {"x": x})
    assert np.isfinite(actual).all()
    assert not actual[0, 2].any()
    assert actual[0, 1].any()
    close(np.delete(actual[0], 2, 0), np.delete(per_token(x[0]), 2, 0) @ graphs.dequantized(model, "up"), 1e-5)


def test_linears_that_share_an_input_share_its_quantization() -> None:
    w = graphs.weights()
    nodes = [helper.make_node("MatMul", ["x", name], [f"y{name}"], name=name) for name in ("W1", "V1")]
    outputs = {f"y{name}": ["n", graphs.HIDDEN] for name in ("W1", "V1")}
    proto = graphs.model(nodes, {"x": ["n", graphs.IN]}, outputs, {"W1": w["W1"], "V1": -w["W1"]})
    for activation in (PerToken(), Static(Grid(np.float32(0.1), np.uint8(128)))):
        model = quantized(proto, activation)
        assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 1
        x = sample(2)
        np.testing.assert_array_equal(
            graphs.run(model, {"x": x}), graphs.run(quantized(proto, activation), {"x": x}), strict=True
        )


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("zero", [0, 128, 131])
def test_static_is_its_reference_and_fused(zero: int, rank: int, tmp_path: Path) -> None:
    grid = Grid(np.array(0.05, np.float32), np.array(zero, np.uint8))
    x = (
        np.random.default_rng(2).standard_normal((3, 5, graphs.IN)[3 - rank :]).astype(np.float32) * 4
    )  # some is clipped
    model = quantized(graphs.two_linears(rank=rank), Static(grid))
    w1, w2, b1 = graphs.dequantized(model, "up"), graphs.dequantized(model, "down"), graphs.weights()["b1"]
    hidden = np.maximum(fixed(x, grid) @ w1 + b1, 0)
    # The rounding of `hidden` may fall to the other side of a half: compare where the two agree, which is nearly all.
    expected = fixed(hidden, grid) @ w2
    actual = graphs.run(model, {"x": x}, tmp_path / "o.onnx")
    rows = np.abs(actual - expected).max(axis=-1) <= 1e-4 * np.abs(expected).max()
    assert rows.mean() >= 0.8
    counts = graphs.operators(tmp_path / "o.onnx")
    assert counts["MatMulIntegerToFloat"] == 2
    assert not counts.keys() & {"MatMul", "Gemm", "FusedGemm", "DequantizeLinear"}


def test_output_grids_come_after_the_bias(tmp_path: Path) -> None:
    grid, out = Grid(np.array(0.05, np.float32), np.array(128, np.uint8)), np.array(0.25, np.float32)
    proto = graphs.model(
        [
            helper.make_node("MatMul", ["x", "W1"], ["p"], name="up"),
            helper.make_node("Add", ["p", "b1"], ["y"], name="bias"),
        ],
        {"x": ["n", graphs.IN]},
        {"y": ["n", graphs.HIDDEN]},
        {name: graphs.weights()[name] for name in ("W1", "b1")},
    )
    model = quantized(proto, Static(grid), Static(Grid(out, np.array(120, np.uint8))))
    actual = graphs.run(model, {"x": sample(2)})
    steps = actual / out
    np.testing.assert_array_equal(steps, np.rint(steps))
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert not any(n.op_type == "QuantizeLinear" and "output" in n.name for n in quantized(proto, Static(grid)).graph)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["weight-only", "per-token", "static"])
@pytest.mark.parametrize("c_shape", [None, (graphs.HIDDEN,), (1, graphs.HIDDEN), ()], ids=str)
@pytest.mark.parametrize(
    ("alpha", "beta", "trans_a", "trans_b"), [(1, 1, 0, 0), (1, 1, 0, 1), (0.5, 2, 1, 0), (-1.5, -0.25, 1, 1)]
)
def test_gemm_in_all_its_forms(activation, c_shape, alpha, beta, trans_a, trans_b, tmp_path: Path) -> None:
    w, rng = graphs.weights()["W1"], np.random.default_rng(4)
    constants, names = {"W1": np.ascontiguousarray(w.T) if trans_b else w}, ["x", "W1"]
    c = np.zeros(())
    if c_shape is not None:
        constants["C"] = c = rng.standard_normal(c_shape).astype(np.float32)
        names.append("C")
    node = helper.make_node(
        "Gemm", names, ["y"], name="up", alpha=float(alpha), beta=float(beta), transA=trans_a, transB=trans_b
    )
    dims = [graphs.IN, "n"] if trans_a else ["n", graphs.IN]
    proto = graphs.model([node], {"x": dims}, {"y": ["n", graphs.HIDDEN]}, constants)
    model, x = quantized(proto, activation), sample(2)
    seen = graphs.dequantized(model, "up")
    # Half a step of the largest weight of each column, and float32 rounding.
    assert (np.abs(seen - alpha * w) <= np.abs(alpha * w).max(axis=0) / 254 * (1 + 1e-5)).all()
    expected = reference_input(x, activation).astype(np.float64) @ seen + beta * c.astype(np.float64)
    actual = graphs.run(model, {"x": np.ascontiguousarray(x.T) if trans_a else x}, tmp_path / "o.onnx")
    close(actual, expected, 1e-5)
    counts = graphs.operators(tmp_path / "o.onnx")
    assert counts["MatMulNBits" if activation is None else "MatMulIntegerToFloat"] == 1
    assert not counts.keys() & {"Gemm", "FusedGemm", "QGemm", "MatMul"}


@pytest.mark.parametrize("dtype", RTOL, ids=["float32", "float16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("signed", [True, False], ids=["int8", "uint8"])
def test_weight_only_is_the_float_model_with_dequantized_weights(signed, per_channel, symmetric, dtype) -> None:
    proto = graphs.two_linears(dtype=dtype)
    model = quantized(proto, None, symmetric=symmetric, per_channel=per_channel, signed=signed)
    w = graphs.weights()
    w["W1"], w["W2"] = (graphs.dequantized(model, name) for name in ("up", "down"))
    assert not np.array_equal(w["W1"], graphs.weights()["W1"])
    reference = graphs.two_linears(dtype=dtype)
    for tensor in reference.graph.initializer:
        tensor.raw_data = w[tensor.name].astype(graphs.FLOATS[dtype]).tobytes()
    x = sample(3, dtype)
    close(graphs.run(model, {"x": x}), graphs.run(reference, {"x": x}), RTOL[dtype])


@pytest.mark.parametrize("dtype", RTOL, ids=["float32", "float16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_tables_are_gathered_as_integers(transposed, per_channel, symmetric, dtype) -> None:
    table = np.random.default_rng(6).standard_normal((11, 6)).astype(np.float32) + np.float32(0.7)
    table[3] *= 100
    nodes = [helper.make_node("Gather", ["T", "ids"], ["y"], name="embed")]
    constants = {"T": table}
    if transposed:
        nodes.insert(0, helper.make_node("Transpose", ["H"], ["T"], perm=[1, 0], name="turn"))
        nodes.append(helper.make_node("MatMul", ["y", "H"], ["logits"], name="head"))
        constants = {"H": np.ascontiguousarray(table.T)}
    output = {"logits": ["n", 11]} if transposed else {"y": ["n", 6]}
    model = ir.from_proto(graphs.model(nodes, {"ids": ["n"]}, output, constants, dtype=dtype))
    node = next(n for n in model.graph if n.op_type == "Gather")
    constant = resolve_constant(node.inputs[0])
    assert constant is not None
    assert constant.transposed == transposed
    scheme = WeightScheme(8, symmetric=symmetric, per_channel=per_channel)
    rounded = rounded_weights.nearest(seen(constant).T, scheme)
    Emitter(model).table(node, constant, StoredWeight(rounded, OutputFormat.QDQ))
    stored = next(v for v in model.graph.initializers.values() if v.const_value.dtype is ir.DataType.INT8)
    assert tuple(stored.shape.numpy()) == (11, 6)
    ids = np.array([3, 0, 10, 3])
    actual = graphs.run(model, {"ids": ids})
    real = table.astype(graphs.FLOATS[dtype]).astype(np.float32)
    grid = rounded.grid()
    assert grid.scale.shape == ((1, 11) if per_channel else (1, 1))
    integers = np.clip(np.rint(real.T / grid.scale) + grid.zero_point, -128, 127)
    expected = ((integers - grid.zero_point) * grid.scale).T[ids]
    if transposed:  # the head keeps its float weight: untied
        expected = expected @ real.T
        assert "H" in model.graph.initializers
    else:
        assert "T" not in model.graph.initializers
    assert actual.dtype == graphs.FLOATS[dtype]
    close(actual, expected, RTOL[dtype])


def test_names_stay_unique_and_graph_outputs_keep_theirs() -> None:
    model = quantized(graphs.two_linears(), PerToken())
    names = [value.name for node in model.graph for value in node.outputs]
    assert len(set(names)) == len(names)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert not {"W1", "W2"} & set(model.graph.initializers), "float weights are gone"
