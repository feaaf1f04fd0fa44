"""Static Q/DQ: onnxruntime's own grids from the same data, and onnxruntime's own integer kernels on every export."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import linear_graphs as graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.quant_utils import compute_scale_zp
from ort_grids import SUBTRACTS_EXACTLY

from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.config.enums import QuantGranularity
from quarot_onnx.config.spec import Int8Spec, Int16Spec, QLayerConfig, QTensorConfig, UInt8Spec, UInt16Spec
from quarot_onnx.errors import CalibrationError, MissingPackageError
from quarot_onnx.evaluation.perplexity import perplexity
from quarot_onnx.pipeline import quantize

EXPORTS: dict[str, Callable[[], Path]] = {
    "optimum": lambda: exports.optimum_export("llama"),
    "optimum tied": lambda: exports.optimum_export("llama", tied=True),
    "optimum biases": lambda: exports.optimum_export("qwen2"),
    "optimum merged": lambda: exports.optimum_export("phi3"),
    "dynamo": lambda: exports.dynamo_export("llama"),
    "genai": exports.genai_like,
    "genai biases": lambda: exports.genai_like(bias=True),
    "genai float16": lambda: exports.genai_like(dtype="fp16"),
    "opset23": exports.opset23_module_export,
}
LINEARS = dict.fromkeys(EXPORTS, 15) | {"optimum merged": 9, "genai": 11, "genai biases": 11, "genai float16": 11}
INTEGER_KERNELS = ("MatMulIntegerToFloat", "QLinearMatMul")


class Reader(CalibrationDataReader):
    """The least that onnxruntime asks for; samples of different length."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        lengths = (4, 9)
        self._feeds = iter([{"x": 3 * rng.standard_normal((1, n, graphs.IN)).astype(np.float32)} for n in lengths])

    def get_next(self) -> Any:
        return next(self._feeds, None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "m.onnx"
    path.parent.mkdir()
    onnx.save(graphs.two_linears(), path)
    return path


SPECS = {"uint8": UInt8Spec, "int8": Int8Spec, "uint16": UInt16Spec, "int16": Int16Spec}
TYPES = {
    "uint8": QuantType.QUInt8,
    "int8": QuantType.QInt8,
    "uint16": QuantType.QUInt16,
    "int16": QuantType.QInt16,
}


def activation_spec(kind: str, *, symmetric: bool) -> QTensorConfig:
    return SPECS[kind](symmetric=symmetric)


@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("w_sym", [True, False], ids=["w-sym", "w-asym"])
@pytest.mark.parametrize("a_sym", [True, False], ids=["a-sym", "a-asym"])
@pytest.mark.parametrize("kind", SPECS)
def test_grids_are_those_of_quantize_static(
    kind: str, *, a_sym: bool, w_sym: bool, per_channel: bool, source: Path, tmp_path: Path
) -> None:
    granularity = QuantGranularity.Channel if per_channel else QuantGranularity.Tensor
    layer = QLayerConfig(
        activation_spec(kind, symmetric=a_sym), Int8Spec(symmetric=w_sym, quant_granularity=granularity)
    )
    quantize(source, tmp_path / "ours.onnx", QConfig(layer), Reader())
    quantize_static(
        str(source), str(tmp_path / "theirs.onnx"), Reader(), quant_format=QuantFormat.QDQ, per_channel=per_channel,
        op_types_to_quantize=["MatMul"], activation_type=TYPES[kind],
        weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod.MinMax,
        extra_options={"ActivationSymmetric": a_sym, "WeightSymmetric": w_sym, "MatMulConstBOnly": True},
    )  # fmt: skip
    ours, theirs = (onnx.load(tmp_path / f"{name}.onnx") for name in ("ours", "theirs"))
    for node in ("up", "down"):
        for mine, other in zip(graphs.activation_grid(ours, node), graphs.activation_grid(theirs, node), strict=True):
            np.testing.assert_array_equal(mine, other)
            assert mine.dtype == other.dtype
        (mine_q, *mine_grid), (other_q, *other_grid) = (graphs.weight_grid(m, node) for m in (ours, theirs))
        if per_channel and not w_sym:  # quantize_static makes these symmetric in silence; its formula does not
            other_q, other_grid = mine_q, channel_grids(graphs.weights()["W1" if node == "up" else "W2"])
        for mine, other in zip(mine_grid, other_grid, strict=True):
            if w_sym or SUBTRACTS_EXACTLY:
                np.testing.assert_array_equal(mine, other)
            else:
                np.testing.assert_allclose(mine, other, rtol=2.0**-23)
        # onnxruntime divides in float32: a weight next to a half may fall to the other side.
        assert np.abs(mine_q.astype(int) - other_q.astype(int)).max() <= 1
        assert (mine_q == other_q).mean() > 0.98
    assert graphs.operators(tmp_path / "ours.onnx")["QuantizeLinear"] == 2, "no Q/DQ on outputs"
    counts = optimized(tmp_path / "ours.onnx", tmp_path)
    assert counts["MatMulIntegerToFloat"] == (0 if kind.endswith("16") else 2)


def channel_grids(weight: np.ndarray) -> list[np.ndarray]:
    """Scales and zero points of asymmetric int8 columns by onnxruntime's formula."""
    limits = np.array(-128, np.int8), np.array(127, np.int8)
    pairs = [compute_scale_zp(column.min(), column.max(), *limits, symmetric=False) for column in weight.T]
    return [np.array([scale for _, scale in pairs]), np.array([zero for zero, _ in pairs])]


def test_outputs_are_quantized_only_where_asked(source: Path, tmp_path: Path) -> None:
    layer = QLayerConfig(activation=UInt8Spec(), weight=Int8Spec(), output_tensors=UInt8Spec())
    quantize(source, tmp_path / "q.onnx", QConfig(layer), Reader())
    assert graphs.operators(tmp_path / "q.onnx")["QuantizeLinear"] == 4
    x = np.random.default_rng(5).standard_normal((1, 6, graphs.IN)).astype(np.float32)
    graphs.run(tmp_path / "q.onnx", {"x": x}, tmp_path / "o.onnx")
    counts = graphs.operators(tmp_path / "o.onnx")
    assert sum(counts[kernel] for kernel in INTEGER_KERNELS) == 2
    assert counts["QLinearMatMul"] >= 1


@pytest.mark.parametrize(
    ("export", "rotated"), [*((name, False) for name in EXPORTS), ("optimum biases", True), ("genai", True)]
)
def test_every_linear_runs_on_integers(export: str, tmp_path: Path, *, rotated: bool) -> None:
    source = EXPORTS[export]()
    layer = QLayerConfig(UInt8Spec(), Int8Spec(quant_granularity=QuantGranularity.Channel))
    reader = TextReader(source, samples=2, seq_len=24)
    config = QConfig(layer, algo_config=[QuarotConfig()] if rotated else [])
    quantize(source, tmp_path / "model.onnx", config, reader, verify=False)
    counts = optimized(tmp_path / "model.onnx", tmp_path)
    assert sum(counts[kernel] for kernel in INTEGER_KERNELS) == LINEARS[export]
    assert "QGemm" not in counts
    # Nothing falls back to float: no weight is dequantized, no Gemm is left.
    assert not counts.keys() & {"DequantizeLinear", "Gemm", "FusedGemm", "MatMulNBits"}


def test_static_int8_stays_close_to_float(tmp_path: Path) -> None:
    """8 bits on a random two-layer model cost little; a grid on the wrong tensor would cost everything."""
    source = EXPORTS["optimum"]()
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    layer = QLayerConfig(UInt8Spec(), Int8Spec(quant_granularity=QuantGranularity.Channel))
    quantize(source, tmp_path / "model.onnx", QConfig(layer), TextReader(source, text, samples=4, seq_len=64))
    before, after = (
        perplexity(path, text, source.parent, seq_len=64, windows=4).nll for path in (source, tmp_path / "model.onnx")
    )
    # Logits are off by about 1 % of their size of a few nats.
    assert abs(after - before) < 0.05
    assert after != before


def optimized(path: Path, folder: Path) -> Any:
    from quarot_onnx.sessions import runtime  # noqa: PLC0415

    runtime.session(path, threads=1, optimized_path=folder / "optimized.onnx")
    return graphs.operators(folder / "optimized.onnx")


def test_gemm_runs_on_integers_too(tmp_path: Path) -> None:
    w = graphs.weights()
    node = helper.make_node("Gemm", ["x", "W1", "b1"], ["y"], name="up", alpha=0.5)
    proto = graphs.model([node], {"x": ["n", graphs.IN]}, {"y": ["n", graphs.HIDDEN]}, {"W1": w["W1"], "b1": w["b1"]})
    onnx.save(proto, tmp_path / "m.onnx")
    x = np.random.default_rng(5).standard_normal((6, graphs.IN)).astype(np.float32)
    quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", QConfig(QLayerConfig(UInt8Spec(), Int8Spec())), Once(x))
    counts = optimized(tmp_path / "q.onnx", tmp_path)
    assert counts["MatMulIntegerToFloat"] == 1
    assert not counts.keys() & {"Gemm", "QGemm", "MatMul", "DequantizeLinear"}
    expected = 0.5 * x @ w["W1"] + w["b1"]
    actual = graphs.run(tmp_path / "q.onnx", {"x": x})
    # Half a step of 255 on either operand, 16 terms: some 2 % of the largest value.
    assert np.abs(actual - expected).max() < 0.02 * np.abs(expected).max()


class Once:
    """One sample, from any object with get_next."""

    def __init__(self, x: np.ndarray) -> None:
        self._feeds = iter([{"x": x}])

    def get_next(self) -> Any:
        return next(self._feeds, None)


@pytest.fixture
def contrib(tmp_path: Path) -> Path:
    """``y = max(x, 0) W1``, the maximum by an operator of onnxruntime-extensions."""
    nodes = [
        helper.make_node("NegPos", ["x"], ["negative", "positive"], domain="ai.onnx.contrib", name="split"),
        helper.make_node("MatMul", ["positive", "W1"], ["y"], name="up"),
    ]
    graph = helper.make_graph(
        nodes,
        "contrib",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", graphs.IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", graphs.HIDDEN])],
        [onnx.numpy_helper.from_array(graphs.weights()["W1"], "W1")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.contrib", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_operators_of_onnxruntime_extensions_calibrate_too(contrib: Path, tmp_path: Path) -> None:
    x = np.linspace(-4, 2, 5 * graphs.IN, dtype=np.float32).reshape(5, graphs.IN)
    quantize(contrib, tmp_path / "q.onnx", QConfig(QLayerConfig(UInt8Spec(), Int8Spec())), Once(x))
    scale, zero = graphs.activation_grid(onnx.load(tmp_path / "q.onnx"), "up")
    assert zero == 0
    np.testing.assert_allclose(scale, 2 / 255, rtol=2.0**-23)
    assert optimized(tmp_path / "q.onnx", tmp_path)["MatMulIntegerToFloat"] == 1


def test_without_the_extensions_the_pip_line_is_given(
    contrib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_extensions", None)
    x = np.ones((5, graphs.IN), np.float32)
    with pytest.raises(MissingPackageError, match="pip install onnxruntime-extensions"):
        quantize(contrib, tmp_path / "q.onnx", QConfig(QLayerConfig(UInt8Spec(), Int8Spec())), Once(x))


@pytest.mark.parametrize("reader", [None, object()], ids=["none", "no reader"])
def test_a_missing_reader_is_told_before_any_work(reader: Any, source: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    config = QConfig(QLayerConfig(UInt8Spec(), Int8Spec()), algo_config=[QuarotConfig()])
    with pytest.raises(CalibrationError, match=r"calibration data|get_next"):
        quantize(source, tmp_path / "q.onnx", config, reader, progress=lambda phase, *_: steps.append(phase))
    assert not steps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
