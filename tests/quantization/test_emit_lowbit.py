"""Weights rounded beforehand, as onnxruntime multiplies them and as files hold them, against NumPy."""

from dataclasses import replace
from itertools import product
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
from quarot_onnx.io import model_io
from quarot_onnx.quantization.activations import Activation, FakePerToken, FakeStatic, PerToken, Static, round_trip
from quarot_onnx.quantization.grids import Grid
from quarot_onnx.quantization.scheme import QuantizedWeight, WeightScheme

IN, OUT = 37, 29
# Sums of at most 160 products, each rounded to 6e-8 of it in float32, in another order than NumPy's.
RTOL = {TensorProto.FLOAT: 1e-5, TensorProto.FLOAT16: 2e-3}
STATIC = Static(Grid(np.array(0.02, np.float32), np.array(120, np.uint8)))
FAKE_STATIC = FakeStatic(6, symmetric=False, scale=0.125, zero_point=30)
FIXED = (PerToken(), PerToken(0.8), STATIC)
W4A8, NBITS, W8, FAKE = OutputFormat.W4A8, OutputFormat.NBITS, OutputFormat.W8, OutputFormat.FAKE

FLAGS = [
    pytest.param(dict(zip(("symmetric", "signed"), flags, strict=True)), id=f"{name}-{kind}")
    for flags, (name, kind) in zip(
        product((True, False), repeat=2), product(("symmetric", "asymmetric"), ("signed", "unsigned")), strict=True
    )
]


def matmul(features: int = IN, outputs: int = OUT, *, opset: int = 18, dtype: int = TensorProto.FLOAT, bias=False):
    nodes = [helper.make_node("MatMul", ["x", "W"], ["p" if bias else "y"], name="up")]
    constants = {"W": np.zeros((features, outputs), np.float32)}
    if bias:
        nodes.append(helper.make_node("Add", ["p", "b"], ["y"], name="bias"))
        constants["b"] = np.linspace(-3, 3, outputs, dtype=np.float32)
    dims = {"x": ["n", features]}
    return graphs.model(nodes, dims, {"y": ["n", outputs]}, constants, opset=opset, dtype=dtype)


def emitted(proto, weight: QuantizedWeight, form: OutputFormat, activation: Activation = None, **options) -> ir.Model:
    model = ir.from_proto(proto)
    emitter = Emitter(model)
    for linear in list(linears(model.graph)):
        emitter.linear(linear, StoredWeight(rounded_weights.rounded(weight), form, **options), activation)
    return model


def saved(model: ir.Model, tmp_path: Path) -> Path:
    return model_io.save(model, tmp_path / "m.onnx").path


def sample(features: int = IN, rows: int = 5, dtype: int = TensorProto.FLOAT) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((rows, features)).astype(graphs.FLOATS[dtype])


def close(actual: np.ndarray, x: np.ndarray, weight: QuantizedWeight, activation: Activation, rtol: float = 1e-5):
    """Against Σ|x̂ w|, the size that roundings of a sum go by."""
    seen, real = round_trip(x.astype(np.float32), activation).astype(np.float64), weight.dequantized()
    size = np.abs(seen) @ np.abs(real)
    assert size.min() > 0
    assert (np.abs(actual - seen @ real) <= rtol * size).all()


@pytest.mark.parametrize("activation", FIXED, ids=["token", "clipped", "static"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "matrix"])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(("form", "bits"), [(W4A8, 2), (W4A8, 3), (W4A8, 4), (W4A8, 8), (W8, 3), (W8, 8)])
def test_beside_8_bit_activations_a_quantized_kernel_runs(form, bits, flags, per_channel, activation, tmp_path):
    weight = rounded_weights.quantized((IN, OUT), WeightScheme(bits, per_channel=per_channel, **flags))
    path, x = saved(emitted(matmul(), weight, form, activation), tmp_path), sample()
    close(graphs.run(path, {"x": x}, tmp_path / "o.onnx"), x, weight, activation)
    counts = graphs.operators(tmp_path / "o.onnx")
    assert counts["MatMulIntegerToFloat"] == 1
    assert not counts.keys() & {"MatMul", "Gemm", "Cast", "MatMulNBits"}
    four = form is W4A8 and bits < 8
    kind = ("int" if flags["signed"] or (bits < 8 and not four) else "uint") + ("4" if four else "8")
    np.testing.assert_array_equal(rounded_weights.initializer(path, f"W_{kind}").astype(int), weight.integers)
    flat = weight.scale[0] if per_channel else weight.scale.reshape(())
    np.testing.assert_array_equal(rounded_weights.initializer(path, "W_scale"), flat, strict=True)
    if four:
        assert path.stat().st_size < matmul().ByteSize()


@pytest.mark.parametrize("features", [IN, 160])
@pytest.mark.parametrize("group", [None, 16, 32, 64, 128])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(("form", "bits"), [(NBITS, 2), (NBITS, 3), (NBITS, 4), (NBITS, 8), (W8, 4), (W8, 8)])
def test_weight_only_runs_as_matmul_n_bits(form, bits, flags, group, features, tmp_path) -> None:
    weight = rounded_weights.quantized((features, OUT), WeightScheme(bits, group_size=group, **flags))
    path = saved(emitted(matmul(features, opset=17), weight, form, accuracy_level=1), tmp_path)
    x = sample(features)
    close(graphs.run(path, {"x": x}, tmp_path / "o.onnx"), x, weight, None)
    counts = graphs.operators(tmp_path / "o.onnx")
    assert counts == {"MatMulNBits": 1}
    stored = 8 if bits == 8 or form is W8 else 4
    held = rounded_weights.unpacked(rounded_weights.initializer(path, "W_packed"), stored).reshape(OUT, -1).T
    shift = 2 ** (stored - 1) - weight.scheme.middle
    np.testing.assert_array_equal(held[:features].astype(int) - shift, weight.integers)
    assert any(name.endswith("_zero_point") for name in ir.load(path).graph.initializers) != flags["symmetric"]
    if group is None:
        assert rounded_weights.initializer(path, "W_scale").shape == (OUT, -(-features // min(128, len(held))))


@pytest.mark.parametrize(("group", "block"), [(48, 16), (96, 32), (512, 256), (1024, 128)])
def test_a_group_is_made_of_the_largest_blocks(group: int, block: int) -> None:
    weight = rounded_weights.quantized((600, OUT), WeightScheme(4, symmetric=False, group_size=group))
    model, x = emitted(matmul(600), weight, NBITS, accuracy_level=1), sample(600)
    close(graphs.run(model, {"x": x}), x, weight, None)
    node = next(iter(model.graph))
    assert node.attributes["block_size"].as_int() == block
    assert node.inputs[2] is not None
    assert node.inputs[2].shape == ir.Shape((OUT, -(-600 // block)))


@pytest.mark.parametrize("per_channel", [True, False])
def test_without_groups_the_scale_is_repeated_for_every_block(per_channel: bool) -> None:
    weight = rounded_weights.quantized((300, OUT), WeightScheme(4, symmetric=False, per_channel=per_channel))
    model, x = emitted(matmul(300), weight, NBITS, accuracy_level=1), sample(300)
    close(graphs.run(model, {"x": x}), x, weight, None)
    node = next(iter(model.graph))
    assert node.attributes["block_size"].as_int() == 128
    assert node.inputs[2] is not None
    assert node.inputs[2].shape == ir.Shape((OUT, 3))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32, 64])
def test_2_bits_stay_2_bits_where_they_are_multiplied_as_they_are(
    group: int | None, symmetric: bool, tmp_path: Path
) -> None:
    weight = rounded_weights.quantized((160, OUT), WeightScheme(2, group_size=group, symmetric=symmetric))
    path = saved(emitted(matmul(160), weight, NBITS, accuracy_level=4), tmp_path)
    # Activations are rounded to ±127 steps of each block's maximum: half a step an element.
    x = sample(160)
    close(graphs.run(path, {"x": x}), x, weight, None, rtol=np.abs(x).max() / 254 / np.abs(x).mean(axis=1).min())
    held = rounded_weights.unpacked(rounded_weights.initializer(path, "W_packed"), 2).reshape(OUT, -1).T
    np.testing.assert_array_equal(held[:160].astype(int) - 2, weight.integers)
    node = next(iter(model_io.load(path).graph))
    assert [node.attributes[name].as_int() for name in ("bits", "accuracy_level")] == [2, 4]


@pytest.mark.parametrize(
    "activation", [None, *FIXED, FakePerToken(4), FakePerToken(3, symmetric=False, clip_ratio=0.9)], ids=str
)
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fake_weights_are_the_real_numbers(bits, group, flags, activation, tmp_path: Path) -> None:
    weight = rounded_weights.quantized((IN, OUT), WeightScheme(bits, group_size=group, **flags))
    path, x = saved(emitted(matmul(), weight, FAKE, activation), tmp_path), sample()
    close(graphs.run(path, {"x": x}), x, weight, activation)
    np.testing.assert_array_equal(rounded_weights.initializer(path, "W_rounded"), weight.dequantized(), strict=True)


CASES = [
    (W4A8, PerToken(), {}),
    (W4A8, STATIC, {}),
    (W8, PerToken(), {}),
    (W8, None, {}),
    (NBITS, None, {"group_size": 32}),
    (FAKE, None, {"group_size": 16}),
    (FAKE, FakePerToken(8, symmetric=False), {}),
    (FAKE, FAKE_STATIC, {}),
]
IDS = ["w4a8-token", "w4a8-static", "w8-token", "w8", "nbits", "fake", "fake-asymmetric", "fake-static"]


@pytest.mark.parametrize("dtype", RTOL, ids=["float32", "float16"])
@pytest.mark.parametrize("opset", [13, 17, 18, 20, 21, 22])
@pytest.mark.parametrize(("form", "activation", "grid"), CASES, ids=IDS)
def test_every_opset_and_type_of_model(form, activation, grid, opset, dtype) -> None:
    weight = rounded_weights.quantized((IN, OUT), WeightScheme(4, **grid))
    model = emitted(matmul(opset=opset, dtype=dtype, bias=True), weight, form, activation)
    x = sample(dtype=dtype)
    actual = graphs.run(model, {"x": x})
    assert actual.dtype == graphs.FLOATS[dtype]
    bias = np.linspace(-3, 3, OUT, dtype=np.float32).astype(graphs.FLOATS[dtype])
    # A float16 result is rounded with its bias, which may be larger than the product.
    close(actual.astype(np.float64) - bias, x, weight, activation, 3 * RTOL[dtype])
    assert model.graph.opset_imports[""] == (max(opset, 21) if form is W4A8 else opset)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert "W" not in model.graph.initializers


@pytest.mark.parametrize(("form", "activation", "grid"), CASES, ids=IDS)
@pytest.mark.parametrize(("alpha", "beta", "trans_a", "trans_b"), [(1, 1, 0, 1), (0.5, 2, 1, 0), (-1.5, -0.25, 1, 1)])
def test_gemm_in_all_its_forms(form, activation, grid, alpha, beta, trans_a, trans_b, tmp_path: Path) -> None:
    c = np.random.default_rng(4).standard_normal(OUT).astype(np.float32)
    constants = {"W": np.zeros((OUT, IN) if trans_b else (IN, OUT), np.float32), "C": c}
    node = helper.make_node(
        "Gemm", ["x", "W", "C"], ["y"], name="up", alpha=float(alpha), beta=float(beta), transA=trans_a, transB=trans_b
    )
    dims = [IN, "n"] if trans_a else ["n", IN]
    proto = graphs.model([node], {"x": dims}, {"y": ["n", OUT]}, constants, opset=17)
    weight, x = rounded_weights.quantized((IN, OUT), WeightScheme(4, **grid)), sample()
    model = emitted(proto, weight, form, activation)
    actual = graphs.run(model, {"x": np.ascontiguousarray(x.T) if trans_a else x}, tmp_path / "o.onnx")
    close(actual - (beta * c).astype(np.float64), x, weight, activation)
    kernel = "MatMulIntegerToFloat" if isinstance(activation, PerToken | Static) else "MatMulNBits"
    assert graphs.operators(tmp_path / "o.onnx")[kernel] == (form is not FAKE)


@pytest.mark.parametrize(("form", "activation", "grid"), CASES, ids=IDS)
def test_linears_that_share_an_input_share_its_nodes(form, activation, grid) -> None:
    nodes = [helper.make_node("MatMul", ["x", name], [f"y{name}"], name=name) for name in ("V", "W")]
    constants = {name: np.zeros((IN, OUT), np.float32) for name in ("V", "W")}
    proto = graphs.model(nodes, {"x": ["n", IN]}, {f"y{name}": ["n", OUT] for name in "VW"}, constants)
    weight = rounded_weights.quantized((IN, OUT), WeightScheme(4, **grid))
    counts = [
        sum(n.op_type == kind for n in emitted(proto, weight, form, activation).graph) for kind in ("Div", "Cast")
    ]
    once = emitted(matmul(), weight, form, activation).graph
    assert counts == [sum(n.op_type == "Div" for n in once), 2 * sum(n.op_type == "Cast" for n in once)]


def test_ways_of_quantizing_one_input_do_not_mix() -> None:
    ways = [PerToken(), PerToken(0.5), FakePerToken(4), FakePerToken(4, symmetric=False), FAKE_STATIC]
    ways += [FakeStatic(6, scale=0.125), FakeStatic(6, scale=0.25)]
    names = [f"W{i}" for i in range(len(ways))]
    nodes = [helper.make_node("MatMul", ["x", name], [f"y{name}"], name=name) for name in names]
    nodes.append(helper.make_node("Concat", [f"y{name}" for name in names], ["y"], axis=1, name="all"))
    constants = {name: np.zeros((IN, OUT), np.float32) for name in names}
    model = ir.from_proto(graphs.model(nodes, {"x": ["n", IN]}, {"y": ["n", OUT * len(ways)]}, constants))
    weight = rounded_weights.quantized((IN, OUT), WeightScheme(4))
    emitter, x = Emitter(model), sample()
    for linear, way in zip(list(linears(model.graph)), ways, strict=True):
        emitter.linear(linear, StoredWeight(rounded_weights.rounded(weight), FAKE), way)
    for part, way in zip(np.split(graphs.run(model, {"x": x}), len(ways), axis=1), ways, strict=True):
        close(part, x, weight, way)


def test_integers_are_read_once_and_not_before_the_model_is_written(tmp_path: Path) -> None:
    weight = rounded_weights.quantized((IN, OUT), WeightScheme(4, symmetric=False))
    given, reads = rounded_weights.rounded(weight), []
    given = replace(given, load=lambda: reads.append(1) or weight)
    for form, activation in ((W4A8, PerToken()), (NBITS, None), (W8, None), (FAKE, None)):
        model = ir.from_proto(matmul())
        emitter = Emitter(model)
        emitter.linear(next(linears(model.graph)), StoredWeight(given, form), activation)
        assert not reads
        saved(model, tmp_path)
        assert len(reads) == 1
        reads.clear()


@pytest.mark.parametrize(
    ("form", "activation", "grid"),
    [
        (W4A8, None, {}),
        (W4A8, FakePerToken(8), {}),
        (W4A8, FAKE_STATIC, {}),
        (W8, FAKE_STATIC, {}),
        (NBITS, FAKE_STATIC, {}),
        (W4A8, PerToken(), {"group_size": 16}),
        (W8, PerToken(), {"group_size": 16}),
        (NBITS, PerToken(), {}),
        (NBITS, None, {"group_size": 24}),
        (NBITS, None, {"group_size": 8}),
        (FAKE, FakePerToken(4, group_size=16), {}),
    ],
)
def test_what_does_not_go_together_is_our_own_bug(form, activation, grid) -> None:
    weight = rounded_weights.quantized((IN, OUT), WeightScheme(4, **grid))
    with pytest.raises(AssertionError):
        emitted(matmul(), weight, form, activation)
