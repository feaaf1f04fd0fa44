"""Every product with a constant matrix that stays in float is told, with the reason; nothing else is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import exports
import io_models
import linear_graphs as graphs
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from quarot_onnx.config import QConfig
from quarot_onnx.config.enums import QuantGranularity
from quarot_onnx.config.rounding import GPTQConfig
from quarot_onnx.config.spec import Int4Spec, Int8Spec, QLayerConfig, UInt8Spec
from quarot_onnx.errors import ModelError
from quarot_onnx.graph.linear import linears
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import Outcome, quantize
from quarot_onnx.quantization.left_float import left_in_float

K = 16
X = np.random.default_rng(1).standard_normal((1, 5, K)).astype(np.float32)
W8 = QConfig(QLayerConfig(weight=Int8Spec(quant_granularity=QuantGranularity.Channel)))
CHANNEL = Int8Spec(quant_granularity=QuantGranularity.Channel)
PER_TOKEN = UInt8Spec(symmetric=True, quant_granularity=QuantGranularity.Token)
SCHEMES = {
    "w8": W8,
    "dynamic": QConfig(QLayerConfig(PER_TOKEN, CHANNEL)),
    "static": QConfig(QLayerConfig(UInt8Spec(), CHANNEL)),
    "rtn 4": QConfig(QLayerConfig(weight=Int4Spec())),
    "gptq 4": QConfig(QLayerConfig(weight=Int4Spec()), algo_config=[GPTQConfig(bits=4)]),
}


def told(done: Outcome) -> tuple[str, ...]:
    """The notes on what stays in float."""
    return tuple(note for note in done.notes if " in float: " in note)


class Reader:
    """Feeds what it was given."""

    def __init__(self, *samples: NDArray[np.float32]) -> None:
        self.samples = list(samples)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return {"x": self.samples.pop()} if self.samples else None


def reader() -> Reader:
    return Reader(*(np.random.default_rng(i).standard_normal((1, 20, K)).astype(np.float32) for i in range(2)))


def relative_error(source: Path, made: Path) -> float:
    """Of the graph as it is written: with its operators fused some processors saturate."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact, near = (
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": X})[0]
        for path in (source, made)
    )
    return float(np.linalg.norm(near - exact) / np.linalg.norm(exact))


def array(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def model(nodes: Sequence[onnx.NodeProto], constants: dict[str, NDArray[Any]], folder: Path) -> Path:
    """``y`` of ``x: [1, 5, K]``: first a Linear named plain, then ``nodes``, which read ``h``."""
    plain = helper.make_node("MatMul", ["x", "W"], ["h"], name="plain")
    graph = helper.make_graph(
        [plain, *nodes],
        "left",
        [helper.make_tensor_value_info("x", 1, [1, "s", K])],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(value, name) for name, value in {"W": array(K, K), **constants}.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return io_models.write(helper.make_model(graph, opset_imports=opsets, ir_version=9), folder / "in.onnx")


def node(op: str, *inputs: str, domain: str = "", out: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [out], name="odd", domain=domain, **attributes)


FLAT = helper.make_node("Reshape", ["h", "flat"], ["f"])
TURNED = helper.make_node("Transpose", ["h"], ["t"], perm=[0, 2, 1])
MICROSOFT = "com.microsoft"
ODD: dict[str, tuple[list[onnx.NodeProto], dict[str, NDArray[Any]], str]] = {
    "leading one": ([node("MatMul", "h", "V")], {"V": array(1, K, K)}, "has 3 axes, not 2"),
    "batched": ([node("MatMul", "h", "V")], {"V": array(1, 1, K, K)}, "has 4 axes, not 2"),
    "left": ([TURNED, node("MatMul", "V", "t")], {"V": array(K, K)}, "is the first operand"),
    "fused left": (
        [node("FusedMatMul", "V", "h", domain=MICROSOFT, transB=1)],
        {"V": array(K, K)},
        "the first operand",
    ),
    "fused turned": (
        [TURNED, node("FusedMatMul", "t", "V", domain=MICROSOFT, transA=1)],
        {"V": array(K, K)},
        "transposes",
    ),
    "computed": (
        [helper.make_node("Neg", ["V"], ["n"]), node("MatMul", "h", "n")],
        {"V": array(K, K)},
        "computed from constants",
    ),
    "gemm": (
        [FLAT, helper.make_node("ReduceMax", ["f"], ["b"], axes=[0]), node("Gemm", "f", "V", "b")],
        {"V": array(K, K), "flat": np.array([-1, K])},
        "the bias is not constant",
    ),
    "einsum": ([node("Einsum", "h", "V", equation="bsk,nk->bsn")], {"V": array(K, K)}, "Einsum is not quantized here"),
    "conv": ([TURNED, node("Conv", "t", "V")], {"V": array(K, K, 1)}, "Conv is not quantized here"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_matrix_that_stays_in_float_is_told_once_with_its_reason(case: str, tmp_path: Path) -> None:
    nodes, constants, reason = ODD[case]
    source = model(nodes, constants, tmp_path)
    done = quantize(source, tmp_path / "out.onnx", W8)
    assert done.recipe["quantization"]["linears"] == 1
    (note,) = told(done)
    assert note.startswith("odd stays in float: ")
    assert reason in note
    assert 0 < relative_error(source, done.saved.path) < 0.05


def test_what_the_user_left_out_is_not_told(tmp_path: Path) -> None:
    nodes, constants, _ = ODD["einsum"]
    source = model(nodes, constants, tmp_path)
    config = QConfig(W8.global_config, exclude=["o*"])
    assert told(quantize(source, tmp_path / "out.onnx", config)) == ()
    assert len(told(quantize(source, tmp_path / "out.onnx", W8))) == 1


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([node("MatMul", "V", "h")], {"V": array(1, 5)}),  # a vector, as RoPE's frequencies
        ([node("Mul", "h", "V")], {"V": array(5, K)}),
        ([TURNED, node("MatMul", "h", "t")], {}),
        ([helper.make_node("MatMul", ["V", "V"], ["v"]), node("Add", "h", "v")], {"V": array(K, K)[:, :K]}),
    ],
)
def test_what_is_no_product_with_a_matrix_is_not_told(nodes, constants, tmp_path: Path) -> None:
    path = model(nodes, constants, tmp_path)
    assert left_in_float(model_io.load(path).graph, W8) == ()


def test_many_nodes_with_one_reason_are_one_note(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["h" if i == 0 else f"h{i}", "V"], [f"h{i + 1}" if i < 5 else "y"], name=f"odd{i}")
        for i in range(6)
    ]
    (note,) = left_in_float(model_io.load(model(nodes, {"V": array(1, K, K)}, tmp_path)).graph, W8)
    assert note == "6 nodes stay in float (odd0, odd1, odd2 and 3 more): the weight has 3 axes, not 2"


EXPORTS = {
    "optimum": lambda: exports.optimum_export("llama"),
    "dynamo": lambda: exports.dynamo_export("phi3"),
    "genai": lambda: exports.genai_like(rotary_outside=True),
    "opset23": exports.opset23_module_export,
}


@pytest.mark.parametrize("export", EXPORTS)
def test_nothing_is_told_of_decoders_whose_matrices_are_linears(export: str) -> None:
    assert left_in_float(model_io.load(EXPORTS[export]()).graph, W8) == ()


def in_an_if(folder: Path) -> Path:
    """``h`` times one of two matrices, in the branches of an If."""
    bodies = {}
    for name in ("then_branch", "else_branch"):
        product = helper.make_node("MatMul", ["h", f"{name}_V"], [f"{name}_y"], name=f"{name}_product")
        out = [helper.make_tensor_value_info(f"{name}_y", 1, None)]
        bodies[name] = helper.make_graph([product], name, [], out)
    nodes = [
        helper.make_node("Shape", ["x"], ["dims"]),
        helper.make_node("Gather", ["dims", "one"], ["length"]),
        helper.make_node("Greater", ["length", "one"], ["many"]),
        helper.make_node("If", ["many"], ["y"], name="choice", **bodies),
    ]
    constants = {f"{name}_V": array(K, K) for name in bodies}
    return model(nodes, {"one": np.array(1), **constants}, folder)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_matmul_inside_an_if_is_treated_alike_by_every_scheme(scheme: str, tmp_path: Path) -> None:
    source = in_an_if(tmp_path)
    done = quantize(source, tmp_path / "out.onnx", SCHEMES[scheme], reader())
    assert done.recipe["quantization"]["linears"] == 1
    note = "2 nodes stay in float (else_branch_product, then_branch_product): the node is inside the If choice"
    assert note in done.notes
    assert 0 < relative_error(source, done.saved.path) < (0.2 if "4" in scheme else 0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_where_all_is_inside_an_if_every_scheme_says_so(scheme: str, tmp_path: Path) -> None:
    proto = onnx.load(in_an_if(tmp_path))
    proto.graph.node[0].CopyFrom(helper.make_node("Identity", ["x"], ["h"], name="plain"))
    source = io_models.write(proto, tmp_path / "in.onnx")
    with pytest.raises(ModelError, match=r"inside the If node 'choice'"):
        quantize(source, tmp_path / "out.onnx", SCHEMES[scheme], reader())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"transB": 1}, {"alpha": 2.0, "transB": 1}])
def test_a_fused_matmul_with_a_constant_weight_is_a_linear(attributes, scheme: str, tmp_path: Path) -> None:
    shape = (24, K) if attributes.get("transB") else (K, 24)
    nodes = [
        node("FusedMatMul", "h", "V", domain=MICROSOFT, out="p", **attributes),
        helper.make_node("Add", ["p", "b"], ["y"], name="bias"),
    ]
    source = model(nodes, {"V": array(*shape), "b": array(24)}, tmp_path)
    (_, fused) = linears(model_io.load(source).graph)
    assert (fused.in_features, fused.out_features, fused.op_type) == (K, 24, "MatMul")
    assert fused.bias is not None
    done = quantize(source, tmp_path / "out.onnx", SCHEMES[scheme], reader())
    assert done.recipe["quantization"]["linears"] == 2
    assert "FusedMatMul" not in graphs.operators(done.saved.path)
    assert 0 < relative_error(source, done.saved.path) < (0.2 if "4" in scheme else 0.05)
