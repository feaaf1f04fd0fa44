"""Bias correction: the mean output error is gone, whatever a Linear looks like, and integer kernels stay."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import linear_graphs as graphs
import numpy as np
import onnx
import pytest
from command_line import Shell
from onnx import TensorProto, helper

from quarot_onnx import ModelQuantizer, SinkPrefixConfig
from quarot_onnx.calibration.readers import SampleReader, TextReader
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import GPTQConfig, QuarotConfig
from quarot_onnx.config.spec import Int3Spec, Int4Spec, Int8Spec, QLayerConfig, QTensorConfig, UInt8Spec, UInt16Spec
from quarot_onnx.errors import ConfigError
from quarot_onnx.pipeline import quantize
from quarot_onnx.sessions import runtime

CHANNEL = UInt8Spec(symmetric=True, quant_granularity="Channel")
STATIC = QLayerConfig(UInt8Spec(), CHANNEL)
EXPORTS: dict[str, tuple[Callable[[], Path], int]] = {
    "optimum": (lambda: exports.optimum_export("llama"), 15),
    "optimum tied": (lambda: exports.optimum_export("llama", tied=True), 15),
    "optimum biases": (lambda: exports.optimum_export("qwen2"), 15),
    "optimum merged": (lambda: exports.optimum_export("phi3"), 9),
    "dynamo": (lambda: exports.dynamo_export("llama"), 15),
    "genai merged": (exports.genai_like, 11),
    "genai biases": (lambda: exports.genai_like(bias=True), 11),
    "genai float16": (lambda: exports.genai_like(dtype="fp16"), 11),
    "opset 23": (exports.opset23_module_export, 15),
}
X = (3 * np.random.default_rng(0).standard_normal((40, graphs.IN)) ** 2 - 1).astype(np.float32)


def operators(path: Path, folder: Path) -> Any:
    runtime.session(path, threads=1, optimized_path=folder / "optimized.onnx")
    return graphs.operators(folder / "optimized.onnx")


def save(
    folder: Path,
    nodes: list[Any],
    *,
    rank: int = 2,
    kind: int = TensorProto.FLOAT,
    out: int = graphs.HIDDEN,
    **more: Any,
) -> Path:
    w = graphs.weights()
    arrays = {name: w[name] for name in ("W1", "b1")} | more
    dtype = np.float16 if kind == TensorProto.FLOAT16 else np.float32
    axes = ["batch", "n"][2 - rank + 1 :]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", kind, [*axes, "m", graphs.IN][-rank:])],
        [helper.make_tensor_value_info("y", kind, [*axes, "m", out][-rank:])],
        [onnx.numpy_helper.from_array(np.asarray(array, dtype), name) for name, array in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "m.onnx")
    return folder / "m.onnx"


def matmul(**kwargs: Any) -> list[Any]:
    return [helper.make_node("MatMul", ["x", "W1"], ["y"], name="up", **kwargs)]


def with_add(bias: str) -> list[Any]:
    return [
        helper.make_node("MatMul", ["x", "W1"], ["h"], name="up"),
        helper.make_node("Add", [bias, "h"], ["y"], name="add"),
    ]


def gemm(inputs: list[str], **attributes: Any) -> list[Any]:
    return [helper.make_node("Gemm", ["x", "W1", *inputs], ["y"], name="up", **attributes)]


GRAPHS: dict[str, dict[str, Any]] = {
    "MatMul": {"nodes": matmul()},
    "MatMul of three axes": {"nodes": matmul(), "rank": 3},
    "MatMul and Add": {"nodes": with_add("b1")},
    "MatMul and Add of three axes": {"nodes": with_add("b3"), "rank": 3, "b3": graphs.weights()["b1"][None, None]},
    "Gemm": {"nodes": gemm([])},
    "Gemm, alpha and beta": {"nodes": gemm(["b1"], alpha=0.5, beta=3.0)},
    "Gemm, beta 0": {"nodes": gemm(["b1"], beta=0.0)},
    "Gemm, one number": {"nodes": gemm(["one"], beta=2.0), "one": np.array([0.5])},
    "float16": {"nodes": with_add("b1"), "kind": TensorProto.FLOAT16},
}


def mean_error(source: Path, target: Path, x: np.ndarray) -> np.ndarray:
    """Of each output channel, relative to the root mean square of the outputs."""
    before, after = (graphs.run(path, {"x": x}).astype(np.float64) for path in (source, target))
    return (after - before).reshape(-1, before.shape[-1]).mean(0) / np.sqrt((before**2).mean())


def rows_of(case: str) -> np.ndarray:
    x = X.reshape(2, 20, -1) if GRAPHS[case].get("rank") == 3 else X
    return x.astype(np.float16 if case == "float16" else np.float32)


@pytest.mark.parametrize("case", GRAPHS)
def test_the_mean_error_is_gone(case: str, tmp_path: Path) -> None:
    source, x = save(tmp_path, **GRAPHS[case]), rows_of(case)
    for corrected in (False, True):
        config = QConfig(STATIC, bias_correction=corrected)
        quantize(source, tmp_path / f"{corrected}.onnx", config, SampleReader([{"x": x}]), check=None)
    plain, better = (np.abs(mean_error(source, tmp_path / f"{c}.onnx", x)).max() for c in (False, True))
    # What is left, with values that are the root mean square on average at most: in float16 the roundings of product,
    # bias and sum, in float32 those of some 16 terms on either side.
    limit = 3 * 2**-11 if case == "float16" else 32 * 2**-24
    assert better < limit < plain / 4
    assert operators(tmp_path / "True.onnx", tmp_path)["MatMulIntegerToFloat"] == 1


@pytest.mark.parametrize("case", GRAPHS)
def test_an_output_is_rounded_behind_its_correction(case: str, tmp_path: Path) -> None:
    source, x = save(tmp_path, **GRAPHS[case]), rows_of(case)
    layers = {"plain": STATIC, "rounded": QLayerConfig(UInt8Spec(), CHANNEL, output_tensors=UInt16Spec())}
    for name, layer in layers.items():
        config = QConfig(layer, bias_correction=True)
        quantize(source, tmp_path / f"{name}.onnx", config, SampleReader([{"x": x}]), check=None)
    y, plain, rounded = (
        graphs.run(tmp_path / f"{name}.onnx", {"x": x}).astype(np.float64) for name in ("m", "plain", "rounded")
    )
    low, high = min(y.min(), 0), max(y.max(), 0)
    # Half a step of the float outputs' range, and the zero point's rounding by as much.
    room = (high - low) / 65535 + (2**-10 * np.abs(y).max() if case == "float16" else 0)
    assert np.abs(rounded - np.clip(plain, low, high)).max() < 1.01 * room


@pytest.mark.parametrize(
    ("activation", "weight", "options"),
    [
        (UInt8Spec(), Int4Spec(), {}),
        (UInt16Spec(), CHANNEL, {}),
        (Int3Spec(quant_granularity="Tensor"), Int4Spec(), {"output_format": "fake"}),
        (Int3Spec(quant_granularity="Tensor"), None, {"output_format": "fake"}),
        (UInt8Spec(), CHANNEL, {"algo_config": [GPTQConfig()]}),
    ],
)
def test_other_bits_and_methods(
    activation: QTensorConfig, weight: QTensorConfig | None, options: dict[str, Any], tmp_path: Path
) -> None:
    source = save(tmp_path, with_add("b1"))
    config = QConfig(QLayerConfig(activation, weight), bias_correction=True, **options)
    quantize(source, tmp_path / "q.onnx", config, SampleReader([{"x": X[:30]}, {"x": X[30:]}]), check=None)
    assert np.abs(mean_error(source, tmp_path / "q.onnx", X)).max() < 2e-6


def test_shared_weights_and_biases_get_biases_of_their_own(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "W1"], ["h"], name="first"),
        helper.make_node("Add", ["h", "b1"], ["hb"], name="first_bias"),
        helper.make_node("Abs", ["x"], ["a"], name="abs"),
        helper.make_node("MatMul", ["a", "W1"], ["g"], name="second"),
        helper.make_node("Add", ["g", "b1"], ["gb"], name="second_bias"),
        helper.make_node("Concat", ["hb", "gb"], ["y"], axis=-1, name="both"),
    ]
    source = save(tmp_path, nodes, out=2 * graphs.HIDDEN)
    quantize(source, tmp_path / "q.onnx", QConfig(STATIC, bias_correction=True), SampleReader([{"x": X}]), check=None)
    assert np.abs(mean_error(source, tmp_path / "q.onnx", X)).max() < 2e-6


def test_a_transposed_input_is_left_as_it_is(tmp_path: Path) -> None:
    source = save(tmp_path, gemm(["b1"], transA=1))
    turned = {"x": np.ascontiguousarray(X[: graphs.IN].T)}
    for corrected in (False, True):
        config = QConfig(STATIC, bias_correction=corrected)
        quantize(source, tmp_path / f"{corrected}.onnx", config, SampleReader([turned]), check=None)
    one, other = (graphs.run(tmp_path / f"{c}.onnx", turned) for c in (False, True))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("export", EXPORTS)
def test_every_linear_still_runs_on_integers(export: str, tmp_path: Path) -> None:
    build, linears = EXPORTS[export]
    source = build()
    config = QConfig(STATIC, bias_correction=True)
    quantize(source, tmp_path / "q.onnx", config, TextReader(source, samples=2, seq_len=24), check=None)
    counts = operators(tmp_path / "q.onnx", tmp_path)
    assert counts["MatMulIntegerToFloat"] == linears
    assert not counts.keys() & {"DequantizeLinear", "Gemm", "FusedGemm", "QGemm", "MatMulNBits"}


def test_behind_rotations_and_a_prefix(tmp_path: Path) -> None:
    source = exports.genai_like(tied_transposed=False)
    algorithms = [QuarotConfig(), SinkPrefixConfig(form="graph", ids=(256, 9))]
    quantizer = ModelQuantizer(QConfig(STATIC, algo_config=algorithms, bias_correction=True))
    reader = TextReader(source, samples=2, seq_len=24)
    quantizer.quantize_model(source, tmp_path / "model.onnx", reader)
    assert quantizer.outcome is not None
    assert quantizer.outcome.fidelity is not None
    assert "correct" in quantizer.outcome.seconds


def test_refused_without_a_fixed_scale() -> None:
    token = UInt8Spec(symmetric=True, quant_granularity="Token")
    for layer in (QLayerConfig(token, Int8Spec()), QLayerConfig(weight=Int8Spec())):
        with pytest.raises(ConfigError, match=r"bias_correction: no input has a fixed scale.*'Tensor'"):
            QConfig(layer, bias_correction=True)


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8", "w4a8"])
def test_refused_on_the_command_line(scheme: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    shell = Shell(capfd)
    refused = shell.fails("quantize", source, tmp_path / "out", "--scheme", scheme, "--bias-correction")
    assert "--bias-correction" in refused
    assert not (tmp_path / "out").exists()


def test_recipe_file_options_and_python_agree(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    few = ("--calib-samples", 2, "--calib-seq-len", 24, "--no-check")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "rotation: {}\nformat: qdq\nweights: {bits: 8, method: rtn, clip: false}\n"
        "activations: {bits: 8, symmetric: false, granularity: tensor, bias_correction: true}\n"
    )
    shell = Shell(capfd)
    shell.ok("quantize", source, tmp_path / "a" / "m.onnx", "--scheme", "w8a8-static", "--bias-correction", *few)
    shell.ok("quantize", source, tmp_path / "b" / "m.onnx", "--recipe", recipe, *few)
    shell.ok("quantize", source, tmp_path / "c" / "m.onnx", "--scheme", "w8a8-static", *few)
    a, b, c = (onnx.load(tmp_path / name / "m.onnx").graph for name in "abc")
    assert a.SerializeToString() == b.SerializeToString()
    extra = {node.op_type for node, other in itertools.zip_longest(a.node, c.node) if node != other}
    assert "Add" in extra
