"""By stages or whole: the same proof, the same check, the same bytes, in every exporter's spelling."""

import filecmp
import itertools
from pathlib import Path

import exports
import numpy as np
import pytest
from batches import left_padded

from quarot_onnx import Check, ModelQuantizer, QConfig, QLayerConfig, QuantGranularity, QuarotConfig, UInt8Spec
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.ranges import RangeRule, collect_ranges
from quarot_onnx.calibration.readers import SampleReader, TextReader
from quarot_onnx.config import Int8Spec, KVCacheConfig, SmoothQuantConfig
from quarot_onnx.config.enums import CalibMethod
from quarot_onnx.errors import CalibrationError
from quarot_onnx.evaluation.perplexity import perplexity
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.run.outcome import Outcome

SMALL = Memory(320_000, by_stages=True)
WEIGHT = UInt8Spec(symmetric=True, quant_granularity=QuantGranularity.Channel)
STATIC = QConfig(QLayerConfig(UInt8Spec(), WEIGHT), algo_config=[QuarotConfig()])


def both(path: Path, folder: Path, config: QConfig) -> tuple[Outcome, Outcome]:
    """Quantize whole and by stages, on windows of text and decode steps behind them."""
    outcomes = []
    for name, memory in (("whole", WHOLE), ("stages", SMALL)):
        quantizer = ModelQuantizer(config)
        reader = TextReader(path, samples=3, seq_len=24)
        quantizer.quantize_model(path, folder / name / "model.onnx", reader, check=Check(tokens=64), memory=memory)
        assert quantizer.outcome is not None
        outcomes.append(quantizer.outcome)
    return outcomes[0], outcomes[1]


def same_files(folder: Path) -> bool:
    names = [file.name for file in (folder / "whole").iterdir()]
    return filecmp.cmpfiles(folder / "whole", folder / "stages", names, shallow=False)[0] == names


@pytest.mark.parametrize("export", exports.EXPORTS)
def test_static_quantization(export: str, tmp_path: Path) -> None:
    whole, stages = both(exports.EXPORTS[export](), tmp_path, STATIC)
    assert whole.equivalence is not None
    assert whole.equivalence.passed
    assert stages.equivalence == whole.equivalence
    assert whole.fidelity is not None
    assert stages.fidelity == whole.fidelity
    assert same_files(tmp_path)


@pytest.mark.parametrize(
    ("export", "cache"), [("optimum llama", False), ("optimum llama", True), ("genai", True), ("optimum fp16", False)]
)
def test_heads_that_are_rotated_online(export: str, cache: bool, tmp_path: Path) -> None:
    """onnxruntime makes one node of R3 of the queries and the scale of the scores."""
    of_cache = [KVCacheConfig(bits=8, scales="tensor")] if cache else []
    config = QConfig(QLayerConfig(UInt8Spec(), WEIGHT), algo_config=[QuarotConfig(r3=True), *of_cache])
    whole, stages = both(exports.EXPORTS[export](), tmp_path, config)
    assert stages.equivalence == whole.equivalence
    assert stages.fidelity == whole.fidelity
    assert same_files(tmp_path)


CONFIGS = {
    "percentile": QConfig(QLayerConfig(UInt8Spec(calibration_method=CalibMethod.Percentile), WEIGHT)),
    "by what the Linears serve best": QConfig(QLayerConfig(UInt8Spec(calibration_method=CalibMethod.Auto), WEIGHT)),
    "smoothing": QConfig(QLayerConfig(UInt8Spec(), WEIGHT), algo_config=[SmoothQuantConfig(alpha=0.5)]),
    "biases": QConfig(QLayerConfig(UInt8Spec(), WEIGHT), bias_correction=True),
    "cache": QConfig(QLayerConfig(UInt8Spec(), WEIGHT), algo_config=[KVCacheConfig(bits=8, scales="tensor")]),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_whatever_else_is_measured(config: str, tmp_path: Path) -> None:
    both(exports.genai_like(tied_transposed=False), tmp_path, CONFIGS[config])
    assert same_files(tmp_path)


@pytest.mark.parametrize("method", [CalibMethod.MinMax, CalibMethod.Percentile])
def test_padding_is_left_out_in_pieces_too(method: CalibMethod) -> None:
    path = exports.dynamo_export("llama", opset=23)
    model = model_io.load(path)
    inputs = ModelInputs.from_model(model, folder=path.parent)
    rng = np.random.default_rng(1)
    samples = [left_padded(inputs, [rng.integers(0, 250, length) for length in lengths]) for lengths in ((5, 9), (7,))]
    names = [str(node.inputs[0].name) for node in model.graph if node.op_type == "MatMul"][2:20]
    rule = RangeRule(method, 99.0)
    whole, stages = (
        collect_ranges(model, names, SampleReader(samples), rule=rule, memory=memory) for memory in (WHOLE, SMALL)
    )
    assert whole == stages


@pytest.mark.parametrize("memory", [WHOLE, SMALL])
def test_what_is_not_finite_is_told_with_its_sample(memory: Memory) -> None:
    path = exports.genai_like(tied_transposed=False)
    model = model_io.load(path)
    names = [str(node.inputs[0].name) for node in model.graph if node.op_type == "MatMul"]
    inputs = ModelInputs.from_model(model, folder=path.parent)
    good = inputs.feed(np.arange(5)[None])
    past = {name: np.full((1, 2, 3, 32), np.nan, np.float32) for name, _ in inputs.presents}
    bad = inputs.feed(np.arange(5)[None], past, 3)
    with pytest.raises(CalibrationError, match="NaN or infinity in sample 1"):
        collect_ranges(model, names, SampleReader([good, bad]), memory=memory)


def test_the_default_int8_specs_of_quark(tmp_path: Path) -> None:
    both(exports.optimum_export("llama"), tmp_path, QConfig(QLayerConfig(UInt8Spec(), Int8Spec())))
    assert same_files(tmp_path)


@pytest.mark.further
@pytest.mark.parametrize("export", ["optimum llama", "optimum fp16", "genai", "dynamo cache"])
def test_perplexity(export: str, tmp_path: Path) -> None:
    """Float and with integers, the end of a window decoded or not, however small the pieces."""
    source, text = exports.EXPORTS[export](), tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and the dog on the log. " * 20)
    quantizer = ModelQuantizer(STATIC)
    reader = TextReader(source, samples=3, seq_len=24)
    quantizer.quantize_model(source, tmp_path / "model.onnx", reader, verify=False, check=None)
    seen: list[tuple[int, int | None]] = []

    def found(path: Path, memory: Memory, decode: int) -> float:
        seen.clear()
        return perplexity(
            path,
            text,
            source.parent,
            seq_len=24,
            windows=3,
            decode=decode,
            memory=memory,
            progress=lambda *now: seen.append(now),
        ).nll

    for path, decode in itertools.product((source, tmp_path / "model.onnx"), (0, 5)):
        whole = found(path, WHOLE, decode)
        assert seen == [(1, 3), (2, 3), (3, 3)]
        for size in (100_000, 320_000, 800_000):
            assert found(path, Memory(size, by_stages=True), decode) == whole
            total = seen[-1][1]
            assert total is not None
            assert total > 3 * (decode + 1)
            assert seen == [(number, total) for number in range(1, total + 1)]
