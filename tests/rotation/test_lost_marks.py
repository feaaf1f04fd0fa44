"""A rotated model that onnxruntime saved anew, without the nodes' marks, is quantized as the rotated file is."""

from collections.abc import Callable
from pathlib import Path

import exports
import hand_decoder
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from planted_sink import plant

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.readers import TokenReader
from quarot_onnx.config import Int8Spec, QConfig, QLayerConfig, QuarotConfig, UInt8Spec
from quarot_onnx.errors import ModelError
from quarot_onnx.graph.linear import linears
from quarot_onnx.graph.tags import is_online
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import quantize, rotate
from quarot_onnx.run.optimizing import optimize

LEVELS = {
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
WEIGHT = Int8Spec(quant_granularity="Channel")
STATIC = QConfig(QLayerConfig(UInt8Spec(), WEIGHT))
IDS = np.random.default_rng(1).integers(5, 100, (4, 24))
IDS[:, 0] = 256  # the planted sink


def hand(folder: Path, intermediate: int) -> Path:
    return hand_decoder.write(folder, hand_decoder.Spec(intermediate=intermediate))


SOURCES: dict[str, Callable[[Path], Path]] = {
    "optimum": lambda folder: plant("optimum", folder),
    "genai": lambda folder: plant("genai", folder),
    "dynamo": lambda _: exports.dynamo_export("llama", with_cache=True),
    "fp16": lambda _: exports.optimum_export("llama", dtype="fp16"),
    "two factors": lambda folder: hand(folder, 1536),
    "three factors": lambda folder: hand(folder, 4096),
}


@pytest.fixture(scope="module", params=SOURCES)
def rotated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With R3 where it can be."""
    folder = tmp_path_factory.mktemp("source")
    target = folder / "rotated" / "model.onnx"
    fused = request.param.endswith("factors")
    rotate(SOURCES[request.param](folder), target, QuarotConfig(r3=None if fused else True), verify=False)
    return target


def saved(source: Path, target: Path, level: str) -> Path:
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4  # it warns that the file suits this machine
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return target


def online(path: Path) -> list[str]:
    """Operators of the marked nodes."""
    return sorted(node.op_type.removeprefix("Fused") for node in model_io.load(path).graph if is_online(node))


def ids_for(inputs: ModelInputs) -> np.ndarray:
    return IDS % inputs.id_range


def logits(path: Path) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = ModelInputs.from_path(path)
    rows = [session.run(["logits"], inputs.feed(row[None]))[0] for row in ids_for(inputs)]
    return np.concatenate(rows).astype(np.float64)


def quantized(source: Path, target: Path) -> tuple[int, np.ndarray]:
    """The number of Linears, and logits."""
    inputs = ModelInputs.from_path(source)
    reader = TokenReader(inputs, ids_for(inputs))
    done = quantize(source, target, STATIC, reader, verify=False, check=None)
    return int(done.recipe["quantization"]["linears"]), logits(target)


@pytest.mark.parametrize("level", LEVELS)
def test_a_saved_copy_is_quantized_as_the_rotated_file(rotated: Path, level: str, tmp_path: Path) -> None:
    copy = saved(rotated, tmp_path / "model.onnx", level)
    assert not any(node.metadata_props for node in onnx.load(copy, load_external_data=False).graph.node)
    assert online(copy) == online(rotated)
    exact = logits(rotated)
    (count, direct), (of_copy, through) = (
        quantized(source, tmp_path / name) for source, name in ((rotated, "a.onnx"), (copy, "b.onnx"))
    )
    assert of_copy == count == sum(1 for _ in linears(model_io.load(rotated).graph))
    # What onnxruntime fuses rounds otherwise, so scales and integers may lie a step apart.
    errors = [np.linalg.norm(found - exact) / np.linalg.norm(exact) for found in (direct, through)]
    assert errors[1] < 1.05 * errors[0]


def test_optimize_keeps_what_is_needed(rotated: Path, tmp_path: Path) -> None:
    optimize(rotated, tmp_path / "model.onnx")
    assert online(tmp_path / "model.onnx") == online(rotated)


def test_blocks_of_a_rotation(tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    rotate(source, tmp_path / "r.onnx", QuarotConfig(block_size=32), verify=False)
    assert "Reshape" in online(tmp_path / "r.onnx")
    assert online(saved(tmp_path / "r.onnx", tmp_path / "s.onnx", "all")) == online(tmp_path / "r.onnx")


@pytest.mark.parametrize(("r3", "kind"), [(None, "R4"), (True, "R3")])
def test_rotations_that_are_not_found_are_refused(r3: bool | None, kind: str, tmp_path: Path) -> None:
    rotate(exports.optimum_export("llama"), tmp_path / "r.onnx", QuarotConfig(r3=r3), verify=False)
    proto = onnx.load(tmp_path / "r.onnx")
    for item in (*proto.graph.initializer, *proto.graph.node):
        item.name = item.name.replace("quarot/factor", "constant")
        if isinstance(item, onnx.NodeProto):
            del item.metadata_props[:]
            item.input[:] = [name.replace("quarot/factor", "constant") for name in item.input]
    onnx.save(proto, tmp_path / "renamed.onnx")
    config = QConfig(QLayerConfig(weight=WEIGHT))
    with pytest.raises(
        ModelError, match=rf"rotated with {kind} at 2 places, .*, and 0 are found .*optimize the output"
    ):
        quantize(tmp_path / "renamed.onnx", tmp_path / "q.onnx", config, verify=False, check=None)
