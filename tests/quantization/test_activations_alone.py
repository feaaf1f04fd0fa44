"""Weights in float, activations rounded: only the inputs of the products change, to what NumPy makes of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import linear_graphs as graphs
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from stage_runs import feeds_of

from quarot_onnx.calibration.readers import SampleReader, TextReader
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import GPTQConfig
from quarot_onnx.config.spec import Int4Spec, Int8Spec, QLayerConfig, QTensorConfig, UInt4Spec, UInt8Spec
from quarot_onnx.emission.emit import Emitter
from quarot_onnx.errors import ConfigError, ModelError
from quarot_onnx.graph.linear import linears
from quarot_onnx.pipeline import quantize
from quarot_onnx.quantization.activations import Activation, FakePerToken, FakeStatic, PerToken, Static, round_trip
from quarot_onnx.quantization.grids import Grid
from quarot_onnx.quantization.select import select
from quarot_onnx.rounding import lowbit
from quarot_onnx.sites.detect import Survey

KINDS: list[Activation] = [
    FakePerToken(4),
    FakePerToken(6, symmetric=False, group_size=8, clip_ratio=0.9),
    FakeStatic.for_range(-2.0, 3.0, 4, symmetric=False),
    PerToken(0.8),
    Static(Grid(np.array(0.05, np.float32), np.array(100, np.uint8))),
]
# Sums of up to 24 products in float32; the rounded inputs are the same to the last bit or two. An output in float16 is
# rounded at 2^-11 of its size, and so are both operands and the bias.
TOLERANCE = {TensorProto.FLOAT: (1e-5, 1e-5), TensorProto.FLOAT16: (4e-3, 2e-2)}


def arrays(given: onnx.ModelProto | Path) -> dict[str, NDArray[Any]]:
    proto = onnx.load(given) if isinstance(given, Path) else given
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def sample(*rows: int) -> NDArray[np.float32]:
    return 2 * np.random.default_rng(3).standard_normal((*rows, graphs.IN)).astype(np.float32)


def reference(x: NDArray[Any], held: dict[str, NDArray[Any]], up: Activation, down: Activation) -> NDArray[np.float32]:
    """``two_linears`` with rounded inputs, values in the model's type where it holds them."""
    dtype = x.dtype
    real = {name: held[name].astype(np.float32) for name in ("W1", "b1", "W2")}
    rounded = round_trip(x.astype(np.float32), up).astype(dtype).astype(np.float32)
    hidden = np.maximum(rounded @ real["W1"] + real["b1"], 0).astype(dtype).astype(np.float32)
    return round_trip(hidden, down).astype(dtype).astype(np.float32) @ real["W2"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rank", [2, 3])
def test_a_rounded_input_and_the_float_weight(kind: Activation, rank: int) -> None:
    proto = graphs.two_linears(rank=rank)
    model = ir.from_proto(proto)
    up, _ = list(linears(model.graph))
    Emitter(model).linear(up, None, kind)
    written = ir.to_proto(model)
    x = sample(*(2, 5)[3 - rank :])
    rtol, atol = TOLERANCE[TensorProto.FLOAT]
    np.testing.assert_allclose(
        graphs.run(model, {"x": x}), reference(x, arrays(proto), kind, None), rtol=rtol, atol=atol
    )
    found, before = arrays(written), {node.name: node for node in proto.graph.node}
    assert all(np.array_equal(found[name], array) for name, array in arrays(proto).items())
    after = {node.name: node for node in written.graph.node}
    assert before.keys() <= after.keys()
    assert all(after[name] == before[name] for name in before.keys() - {"up"}), "all else is what it was"
    assert after["up"].input[1] == "W1"
    assert not any(name.startswith("W") and name not in {"W1", "W2"} for name in found)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_float16_stays_float16(kind: Activation) -> None:
    proto = graphs.two_linears(dtype=TensorProto.FLOAT16)
    model = ir.from_proto(proto)
    up, _ = list(linears(model.graph))
    Emitter(model).linear(up, None, kind)
    held = arrays(ir.to_proto(model))
    assert all(held[name].dtype == np.float16 for name in ("W1", "W2", "b1"))
    x = sample(2, 5).astype(np.float16)
    actual = graphs.run(model, {"x": x})
    assert actual.dtype == np.float16
    rtol, atol = TOLERANCE[TensorProto.FLOAT16]
    np.testing.assert_allclose(actual, reference(x, held, kind, None), rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("flipped", [0, 1])
def test_a_gemm_keeps_its_factors_and_a_shared_weight(kind: Activation, flipped: int) -> None:
    """Two Gemms with one weight, of which only the first is rounded."""
    nodes = [
        helper.make_node("Gemm", ["x", "W1", "b1"], ["p"], name="a", alpha=0.5, beta=2.0, transA=flipped),
        helper.make_node("Gemm", ["x", "W1", "b1"], ["q"], name="b", transA=flipped),
        helper.make_node("Sub", ["p", "q"], ["y"], name="sub"),
    ]
    held = {name: graphs.weights()[name] for name in ("W1", "b1")}
    proto = graphs.model(nodes, {"x": [graphs.IN, "s"] if flipped else ["s", graphs.IN]}, {"y": ["s", 24]}, held)
    model = ir.from_proto(proto)
    first, _ = list(linears(model.graph))
    Emitter(model).linear(first, None, kind)
    x = sample(7)
    actual = graphs.run(model, {"x": np.ascontiguousarray(x.T) if flipped else x})
    expected = 0.5 * round_trip(x, kind) @ held["W1"] + 2 * held["b1"] - (x @ held["W1"] + held["b1"])
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    assert arrays(ir.to_proto(model)).keys() >= held.keys()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    onnx.save(graphs.two_linears(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (UInt4Spec(quant_granularity="Token", clip_ratio=0.9), FakePerToken(4, symmetric=False, clip_ratio=0.9)),
        (UInt8Spec(symmetric=True, quant_granularity="Token"), PerToken()),
        (UInt4Spec(quant_granularity="Tensor"), FakeStatic),
    ],
    ids=["token", "8 bits", "tensor"],
)
def test_from_a_configuration_to_the_file(spec: QTensorConfig, kind: Any, source: Path, tmp_path: Path) -> None:
    samples = [{"x": sample(1, 9)}, {"x": sample(1, 4) / 2}]
    done = quantize(source, tmp_path / "q.onnx", QConfig(QLayerConfig(spec, None)), SampleReader(samples))
    recorded = done.recipe["quantization"]
    assert isinstance(recorded, dict)
    assert (recorded["linears"], recorded["embeddings"]) == (2, 0)
    assert QConfig.from_dict(recorded["config"]).resolved_format == "fake"
    held = arrays(source)
    found = arrays(tmp_path / "q.onnx")
    assert all(np.array_equal(found[name], array) for name, array in held.items())
    kinds = list(_kinds(kind, samples, held))
    x = sample(3, 11)
    # A value of the hidden state that falls on a half may be rounded to the other side: the sample has none.
    np.testing.assert_allclose(
        graphs.run(tmp_path / "q.onnx", {"x": x}), reference(x, held, *kinds), rtol=1e-5, atol=1e-5
    )
    assert not np.allclose(reference(x, held, *kinds), reference(x, held, None, None), rtol=1e-3)


def _kinds(kind: Any, samples: list[Any], held: dict[str, NDArray[Any]]) -> Iterator[Activation]:
    """The way both inputs are rounded; ranges are those of the float model."""
    if kind is not FakeStatic:
        yield from (kind, kind)
        return
    x = np.concatenate([feeds["x"].reshape(-1, graphs.IN) for feeds in samples])
    for seen in (x, np.maximum(x @ held["W1"] + held["b1"], 0)):
        yield FakeStatic.for_range(float(seen.min()), float(seen.max()), 4, symmetric=False)


def test_some_weights_in_float_and_others_rounded(llama_optimum: Path, tmp_path: Path) -> None:
    """Queries and the first MLP's gate stay in float while GPTQ goes block by block."""
    in_float = QLayerConfig(UInt4Spec(quant_granularity="Token"), None)
    layer = QLayerConfig(UInt4Spec(quant_granularity="Token"), Int4Spec())
    config = QConfig(
        layer,
        {in_float: ["*/q_proj/MatMul", "/model/layers.0/mlp/gate_proj/MatMul"]},
        algo_config=[GPTQConfig(enable_aq_calibration=True)],
        exclude=["/lm_head/MatMul"],
        output_format="fake",
    )
    reader = TextReader(llama_optimum, samples=4, seq_len=64)
    done = quantize(llama_optimum, tmp_path / "q.onnx", config, reader)
    recorded = done.recipe["quantization"]
    assert isinstance(recorded, dict)
    assert recorded["linears"] == 14
    model = onnx.load(tmp_path / "q.onnx")
    producers = {output: node for node in model.graph.node for output in node.output}
    float_model = {node.name: node.input[1] for node in onnx.load(llama_optimum).graph.node if node.op_type == "MatMul"}
    # The quantized ones are new nodes; those in float are the old ones with another input.
    kept = [node for node in model.graph.node if node.name in float_model and "_proj/" in node.name]
    kept = [node for node in kept if not node.input[1].endswith("_rounded")]
    assert len(kept) == 3
    found, before = arrays(model), arrays(llama_optimum)
    for node in kept:
        assert node.input[1] == float_model[node.name]
        np.testing.assert_array_equal(found[node.input[1]], before[node.input[1]])
        assert producers[node.input[0]].op_type == "Mul", "the last operation of a rounded activation"
    assert sum(name.endswith("_rounded") for name in found) == 11
    # q shares its rounded input with k and v, gate with up.
    assert graphs.operators(tmp_path / "q.onnx")["Clip"] == 4 * 2


def test_what_rounding_asks_for_is_not_asked_of_weights_in_float() -> None:
    """Neither names of their own, nor a token for each column."""
    proto = graphs.two_linears()
    for node in proto.graph.node:
        node.name = "same" if node.op_type == "MatMul" else node.name
    model = ir.from_proto(proto)
    config = QConfig(QLayerConfig(UInt4Spec(quant_granularity="Token"), None))
    lowbit.check(select(Survey(model), config), config, None)
    both = QConfig(QLayerConfig(UInt4Spec(quant_granularity="Token"), Int4Spec()))
    with pytest.raises(ModelError, match="2 nodes of the graph are named 'same'"):
        lowbit.check(select(Survey(model), both), both, None)
    grouped = QConfig(QLayerConfig(UInt4Spec(quant_granularity="Token", group_size=5), None))
    with pytest.raises(ConfigError, match="group_size=5 of the activation does not divide the 16 input features"):
        lowbit.check(select(Survey(model), grouped), grouped, None)


def test_tokens_are_counted_for_weights_that_are_rounded(llama_optimum: Path, tmp_path: Path) -> None:
    layer = QLayerConfig(UInt4Spec(quant_granularity="Token"), Int4Spec())
    samples = feeds_of(llama_optimum, count=1, length=100)
    rounded = QConfig(layer, algo_config=[GPTQConfig()])
    in_float = QLayerConfig(UInt4Spec(quant_granularity="Token"), None)
    narrow = QConfig(
        layer, {in_float: ["*/o_proj/MatMul", "*/down_proj/MatMul"]}, output_format="fake", algo_config=[GPTQConfig()]
    )
    for config, few in ((rounded, 1), (narrow, 0)):
        done = quantize(llama_optimum, tmp_path / "q.onnx", config, SampleReader(samples), verify=False, check=None)
        assert sum("100 calibration tokens are fewer than the 128 columns" in note for note in done.notes) == few


def test_a_head_in_8_bits_beside_weights_in_float(llama_optimum: Path, tmp_path: Path) -> None:
    head = QLayerConfig(UInt8Spec(symmetric=True, quant_granularity="Token"), Int8Spec(quant_granularity="Channel"))
    layer = QLayerConfig(UInt4Spec(quant_granularity="Token"), None)
    quantize(llama_optimum, tmp_path / "q.onnx", QConfig(layer, {head: ["/lm_head/MatMul"]}))
    assert sum(name.endswith("_rounded") for name in arrays(tmp_path / "q.onnx")) == 1
