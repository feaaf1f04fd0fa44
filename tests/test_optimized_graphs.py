"""Graphs that onnxruntime optimised and saved are decoders like those that were exported."""

import shutil
from collections.abc import Callable
from pathlib import Path

import exports
import hand_decoder
import onnx
import onnxruntime as ort
import pytest
from hand_decoder import Spec
from rotating import check_equivalent, rotate

from quarot_onnx.config import QConfig
from quarot_onnx.config.enums import QuantGranularity
from quarot_onnx.config.spec import QLayerConfig, UInt8Spec
from quarot_onnx.graph.linear import linears
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import quantize
from quarot_onnx.sites.detect import detect

LEVELS = {
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
EXPORTS: dict[str, Callable[[], Path]] = {
    **{f"optimum-{arch}": lambda arch=arch: exports.optimum_export(arch) for arch in exports.ARCHITECTURES},
    # torch.export cannot trace how many tokens a router sends to an expert.
    **{
        f"dynamo-{arch}": lambda arch=arch: exports.dynamo_export(arch)
        for arch in exports.ARCHITECTURES
        if arch != "qwen3_moe"
    },
    "dynamo-cache": lambda: exports.dynamo_export("llama", with_cache=True),
    "dynamo-eager": lambda: exports.dynamo_export("llama", attention="eager"),
    "dynamo-opset23": lambda: exports.dynamo_export("llama", opset=23, with_cache=True),
    "opset23-module": exports.opset23_module_export,
    "genai": exports.genai_like,
    "genai-bias": lambda: exports.genai_like(bias=True),
    "genai-rotary-outside": lambda: exports.genai_like(rotary_outside=True),
}


def optimized(source: Path, folder: Path, level: str) -> Path:
    """What onnxruntime makes of a model, beside the companions; it leaves external data where they were."""
    folder.mkdir()
    for file in source.parent.iterdir():
        if file != source:
            shutil.copy(file, folder)
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.optimized_model_filepath = str(folder / "model.onnx")
    options.log_severity_level = 4  # it warns that the file suits this machine
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return folder / "model.onnx"


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


@pytest.mark.parametrize("export", EXPORTS)
def test_an_optimized_decoder_is_rotated_as_the_exported_one(export: str, tmp_path: Path) -> None:
    source = EXPORTS[export]()
    file = optimized(source, tmp_path / "optimized", "extended")
    target, sites, plan = rotate(file, tmp_path)
    plain = detect(model_io.load(source))
    assert sites.counts() == plain.counts()
    assert sites.layers == 2
    assert len(sites.head) == len(plain.head)
    assert set(plan.counts) == {kind for kind, count in plain.counts().items() if count}
    check_equivalent(source, target)


@pytest.mark.parametrize("level", ["basic", "all"])
@pytest.mark.parametrize("export", ["optimum-qwen2", "dynamo-phi3", "genai"])
def test_at_every_level(export: str, level: str, tmp_path: Path) -> None:
    source = EXPORTS[export]()
    target, sites, _ = rotate(optimized(source, tmp_path / "optimized", level), tmp_path)
    assert sites.counts() == detect(model_io.load(source)).counts()
    check_equivalent(source, target)


@pytest.mark.parametrize("export", ["optimum-llama", "dynamo-gpt_neox", "genai"])
def test_an_optimized_decoder_is_quantized_whole(export: str, tmp_path: Path) -> None:
    file = optimized(EXPORTS[export](), tmp_path / "optimized", "extended")
    activation = UInt8Spec(symmetric=True, quant_granularity=QuantGranularity.Token)
    config = QConfig(QLayerConfig(activation, UInt8Spec(symmetric=True, quant_granularity=QuantGranularity.Channel)))
    done = quantize(file, tmp_path / "int8" / "model.onnx", config)
    assert done.recipe["quantization"]["linears"] == sum(1 for _ in linears(model_io.load(file).graph))
    assert not done.notes


@pytest.mark.parametrize("spec", [Spec(multipliers=True), Spec(multipliers=True, table="tied"), Spec(linear="bias")])
def test_linears_that_the_optimizer_scaled_or_made_gemms(spec: Spec, tmp_path: Path) -> None:
    """Granite's multipliers go into FusedMatMuls; with fixed lengths MatMul and Add become a Gemm of matrices."""
    (tmp_path / "in").mkdir()
    source = hand_decoder.write(tmp_path / "in", spec)
    if spec.linear == "bias":
        proto = onnx.load(source)
        proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 8
        onnx.save(proto, tmp_path / "in" / "model.onnx")
        file = optimized(tmp_path / "in" / "model.onnx", tmp_path / "optimized", "basic")
        assert {"Gemm", "Reshape"} <= operators(file)
        assert detect(model_io.load(file)).counts() == detect(model_io.load(source)).counts()
        return
    file = optimized(source, tmp_path / "optimized", "extended")
    assert "FusedMatMul" in operators(file)
    target, sites, _ = rotate(file, tmp_path)
    assert sites.counts() == detect(model_io.load(source)).counts()
    check_equivalent(source, target)


def test_what_is_tested_here_is_what_the_optimizer_makes(tmp_path: Path) -> None:
    made = operators(optimized(exports.optimum_export("llama"), tmp_path / "llama", "extended"))
    assert {"FusedMatMul", "SimplifiedLayerNormalization", "QuickGelu"} <= made
    made = operators(optimized(exports.dynamo_export("gpt_neox"), tmp_path / "neox", "extended"))
    assert {"FusedMatMul", "SkipLayerNormalization", "BiasGelu", "LayerNormalization"} <= made
