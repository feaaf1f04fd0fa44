"""Which nodes a configuration takes: constant weights, embeddings where asked for, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import exports
import linear_graphs as graphs
import onnx_ir as ir
import pytest

from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.config.spec import Int8Spec, QLayerConfig, UInt8Spec
from quarot_onnx.errors import ConfigError, ModelError
from quarot_onnx.graph.linear import linears
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import quantize, rotate
from quarot_onnx.quantization.select import Selection, select
from quarot_onnx.sites.detect import Survey, detect

W8 = QLayerConfig(weight=Int8Spec())
EXPORTS: dict[str, Callable[[], Path]] = {
    "optimum": lambda: exports.optimum_export("llama"),
    "dynamo": lambda: exports.dynamo_export("llama"),
    "genai": exports.genai_like,
    "opset23": exports.opset23_module_export,
}
# Per layer: q, k, v, o, gate, up, down (genai packs q, k and v); and the head.
LINEARS = {"optimum": 2 * 7 + 1, "dynamo": 2 * 7 + 1, "genai": 2 * 5 + 1, "opset23": 2 * 7 + 1}


def names(selection: Selection) -> list[str]:
    return [job.linear.name for job in selection.linears]


def two() -> ir.Model:
    return ir.from_proto(graphs.two_linears())


@pytest.mark.parametrize("export", EXPORTS)
def test_linears_and_nothing_else(export: str) -> None:
    selection = select(Survey(model_io.load(EXPORTS[export]())), QConfig(W8))
    assert len(selection.linears) == LINEARS[export]
    assert all(job.linear.weight.tensor.shape for job in selection.linears)
    assert not selection.tables


@pytest.mark.parametrize("export", EXPORTS)
def test_the_embedding_is_the_only_table(export: str) -> None:
    model = model_io.load(EXPORTS[export]())
    selection = select(Survey(model), QConfig(W8, OpTypesToQuantize=["Gather"]))
    assert [job.node for job in selection.tables] == [embedding.node for embedding in detect(model).embeddings]
    assert not selection.linears


@pytest.mark.parametrize("export", ["optimum", "genai"])
def test_online_hadamards_stay_float_in_a_two_step_flow(export: str, tmp_path: Path) -> None:
    source = EXPORTS[export]()
    rotate(source, tmp_path / "rotated.onnx", QuarotConfig(r3=True), verify=False)
    rotated = model_io.load(tmp_path / "rotated.onnx")
    products = [n for n in rotated.graph if n.op_type == "MatMul"]
    before = [n for n in model_io.load(source).graph if n.op_type == "MatMul"]
    assert len(products) > len(before), "R3 and R4 are online"
    selection = select(Survey(rotated), QConfig(W8))
    assert len(selection.linears) == LINEARS[export]
    quantize(tmp_path / "rotated.onnx", tmp_path / "q.onnx", QConfig(W8))
    written = model_io.load(tmp_path / "q.onnx")
    assert sum(n.op_type == "DequantizeLinear" for n in written.graph) == LINEARS[export]
    assert not list(linears(written.graph)), "every Linear is quantized"


def test_rules_override_each_other() -> None:
    special = QLayerConfig(weight=Int8Spec(symmetric=False))
    both = select(Survey(two()), QConfig(W8, {special: ["down"]}))
    assert {job.linear.name: job.config.weight.symmetric for job in both.linears} == {"up": True, "down": False}
    by_type = select(Survey(two()), QConfig(None, layer_type_config={special: ["MatMul"]}))
    assert [job.config for job in by_type.linears] == [special, special]
    assert names(select(Survey(two()), QConfig(W8, {None: ["^down$"]}))) == ["up"]
    assert names(select(Survey(two()), QConfig(W8, exclude=["d*"]))) == ["up"]
    assert names(select(Survey(two()), QConfig(W8, NodesToQuantize=["down"]))) == ["down"]


@pytest.mark.parametrize(
    "options",
    [{"exclude": ["dwon"]}, {"specific_layer_config": {W8: ["dwon"]}}, {"NodesToQuantize": ["dwon"]}],
    ids=str,
)
def test_a_name_that_matches_nothing_is_told_with_the_nearest(options: dict) -> None:
    with pytest.raises(ConfigError, match=r"'dwon'.*did you mean 'down'"):
        select(Survey(two()), QConfig(W8, **options))


def test_nothing_left_and_old_opsets_are_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to quantize: no MatMul, Gemm"):
        select(Survey(two()), QConfig(W8, exclude=["*"]))
    old = two()
    old.graph.opset_imports[""] = 12
    with pytest.raises(ConfigError, match=r"opset 12.*13 or later"):
        select(Survey(old), QConfig(W8))


def test_a_quantized_graph_is_refused(tmp_path: Path) -> None:
    ir.save(two(), tmp_path / "m.onnx")
    quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", QConfig(W8, exclude=["down"]))
    with pytest.raises(ModelError, match="already quantized"):
        select(Survey(model_io.load(tmp_path / "q.onnx")), QConfig(QLayerConfig(UInt8Spec(), Int8Spec())))
