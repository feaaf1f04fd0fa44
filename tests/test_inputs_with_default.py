"""Inputs with a default (optional adapters, a temperature) stay inputs, and what is fed there has its effect."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import io_models
import linear_graphs as graphs
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from rotating import RTOL, check_equivalent, rotate

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.config.enums import QuantGranularity
from quarot_onnx.config.rounding import GPTQConfig
from quarot_onnx.config.spec import Int4Spec, Int8Spec, QLayerConfig, UInt8Spec
from quarot_onnx.errors import ConfigError, ModelError
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import quantize
from quarot_onnx.pipeline import rotate as rotate_file
from quarot_onnx.sites.detect import detect
from quarot_onnx.sites.model import Sites

IDS = np.random.default_rng(5).integers(0, exports.BOS, (1, 24))
PER_TOKEN = QLayerConfig(
    UInt8Spec(symmetric=True, quant_granularity=QuantGranularity.Token),
    Int8Spec(quant_granularity=QuantGranularity.Channel),
)
FOUR_BITS = QConfig(QLayerConfig(weight=Int4Spec()), algo_config=[GPTQConfig(bits=4)])
WEIGHT_ONLY = QLayerConfig(weight=Int8Spec(quant_granularity=QuantGranularity.Channel))


class Reader:
    """Feeds what it was given."""

    def __init__(self, *samples: Feeds) -> None:
        self.samples = list(samples)

    def get_next(self) -> Feeds | None:
        return self.samples.pop() if self.samples else None


def logits(path: Path, **more: NDArray[Any]) -> NDArray[Any]:
    feeds = ModelInputs.from_path(path).feed(IDS) | more
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], feeds)[0]


def same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return bool(np.abs(one - other).max() < RTOL[ir.DataType.FLOAT] * np.abs(one).max())


def saved(proto: onnx.ModelProto, source: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in source.parent.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


def overridable(source: Path, name: str, folder: Path) -> tuple[Path, NDArray[Any]]:
    """The model with one of its initializers among the inputs, and that one's value."""
    proto = onnx.load(source)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    proto.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    return saved(proto, source, folder), numpy_helper.to_array(tensor)


def gamma(sites: Sites) -> str:
    assert sites.norms[2].norm.gamma is not None
    return str(sites.norms[2].norm.gamma.value.name)


def bias(sites: Sites) -> str:
    assert sites.attentions[0].value is not None
    assert sites.attentions[0].value.bias is not None
    return str(sites.attentions[0].value.bias.constant.value.name)


WHAT: dict[str, tuple[Callable[[Sites], str], dict[str, int]]] = {
    # What is overridden, and how many places each rotation then has (5, 2 and 2 without).
    "a reader": (lambda s: str(s.norms[0].readers[0].weight.value.name), {"R1": 0, "R4": 2}),
    "gamma": (gamma, {"R1": 0, "R2": 2, "R4": 2}),
    "a down projection": (lambda s: str(s.mlps[0].weight.value.name), {"R1": 0, "R2": 2, "R4": 1}),
    "a bias of V": (bias, {"R1": 5, "R2": 1, "R4": 2}),
    "the head": (lambda s: str(s.head[0].weight.value.name), {"R1": 0, "R2": 2, "R4": 2}),
    "the embedding": (lambda s: str(s.embeddings[0].table.value.name), {"R1": 0}),
}


@pytest.mark.parametrize("what", WHAT)
def test_what_may_be_overridden_is_no_constant(what: str, tmp_path: Path) -> None:
    source = exports.optimum_export("qwen2")
    choose, expected = WHAT[what]
    name = choose(detect(model_io.load(source)))
    file, default = overridable(source, name, tmp_path / "in")
    sites = detect(model_io.load(file))
    assert {kind: sites.counts()[kind] for kind in expected} == expected
    other = {name: default * np.float32(1.5)}
    if sites.layers:
        target, _, _ = rotate(file, tmp_path)
        assert same(logits(file), logits(target))
        assert same(logits(file, **other), logits(target, **other))
        assert not same(logits(target), logits(target, **other))
    done = quantize(file, tmp_path / "int8" / "model.onnx", QConfig(WEIGHT_ONLY))
    assert any("an input with a default" in note for note in done.notes) == (
        what in ("a reader", "a down projection", "the head")
    )
    exact, near = logits(file, **other), logits(done.saved.path, **other)
    assert np.linalg.norm(near - exact) < 0.1 * np.linalg.norm(exact)
    assert not same(near, logits(done.saved.path))


def with_adapters(source: Path, folder: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
    """LoRA of rank 0 beside every query and down projection, as Olive's optional inputs, and adapters of rank 4."""
    proto, rng = onnx.load(source), np.random.default_rng(0)
    sizes = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    adapters: dict[str, NDArray[Any]] = {}
    for node in list(proto.graph.node):
        if not (node.name.endswith(("q_proj/MatMul", "down_proj/MatMul"))):
            continue
        rows, columns = sizes[node.input[1]]
        names = [f"{node.name}.lora_{side}" for side in "AB"]
        for name, shape, free in zip(names, ((rows, 0), (0, columns)), ((rows, "r"), ("r", columns)), strict=True):
            proto.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))
            proto.graph.input.append(helper.make_tensor_value_info(name, 1, free))
            adapters[name] = 0.3 * rng.standard_normal([length or 4 for length in shape]).astype(np.float32)
        result = node.output[0]
        node.output[0] = f"{result}_base"
        at = list(proto.graph.node).index(node) + 1
        for made in reversed(
            [
                helper.make_node("MatMul", [node.input[0], names[0]], [f"{names[0]}_x"], name=f"{names[0]}_mm"),
                helper.make_node("MatMul", [f"{names[0]}_x", names[1]], [f"{names[1]}_x"], name=f"{names[1]}_mm"),
                helper.make_node("Add", [node.output[0], f"{names[1]}_x"], [result], name=f"{names[1]}_add"),
            ]
        ):
            proto.graph.node.insert(at, made)
    return saved(proto, source, folder), adapters


def test_a_rotated_decoder_takes_adapters(tmp_path: Path) -> None:
    file, adapters = with_adapters(exports.optimum_export("llama"), tmp_path / "in")
    done = rotate_file(file, tmp_path / "out" / "model.onnx", QuarotConfig())
    assert done.recipe["rotation"]["counts"] == {"R2": 2, "R4": 2}
    assert any("R1 left out" in note for note in done.notes)
    check_equivalent(file, done.saved.path)
    assert same(logits(file, **adapters), logits(done.saved.path, **adapters))
    assert not same(logits(file), logits(file, **adapters))


@pytest.mark.parametrize("config", [QConfig(PER_TOKEN, algo_config=[QuarotConfig()]), FOUR_BITS], ids=["token", "gptq"])
def test_a_quantized_decoder_takes_adapters(config: QConfig, tmp_path: Path) -> None:
    file, adapters = with_adapters(exports.optimum_export("llama"), tmp_path / "in")
    inputs = ModelInputs.from_path(file)
    rng = np.random.default_rng(1)
    samples = [inputs.feed(rng.integers(0, exports.BOS, (1, 64))) for _ in range(4)]
    done = quantize(file, tmp_path / "out" / "model.onnx", config, Reader(*samples))
    assert any(note.startswith("8 nodes stay in float") and "an input with a default" in note for note in done.notes)
    exact, near = logits(file, **adapters), logits(done.saved.path, **adapters)
    assert np.linalg.norm(near - exact) < 0.3 * np.linalg.norm(exact)  # 4 bits
    assert not same(near, logits(done.saved.path))


def test_calibration_on_adapters(tmp_path: Path) -> None:
    """A sample may override a default; GPTQ then sees what it makes of the activations."""
    file, adapters = with_adapters(exports.optimum_export("llama"), tmp_path / "in")
    inputs = ModelInputs.from_path(file)
    ids = [np.random.default_rng(seed).integers(0, exports.BOS, (1, 64)) for seed in range(4)]
    written = {}
    for name, given in (("none", {}), ("all", adapters), ("some", dict(list(adapters.items())[:2]))):
        samples = [inputs.feed(row) | (given if i or name != "some" else {}) for i, row in enumerate(ids)]
        done = quantize(file, tmp_path / name / "model.onnx", FOUR_BITS, Reader(*samples))
        written[name] = done.saved.path.read_bytes()
    assert len(set(written.values())) == 3


@pytest.mark.parametrize(("ir_version", "opset"), [(3, 8), (9, 17)])
def test_a_model_whose_weights_are_all_inputs(ir_version: int, opset: int, tmp_path: Path) -> None:
    proto = graphs.two_linears()
    proto.ir_version = ir_version
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    source = io_models.write(proto, tmp_path / "in.onnx")
    if ir_version == 3:  # there all initializers are inputs, and constants
        assert quantize(source, tmp_path / "out.onnx", QConfig(WEIGHT_ONLY)).recipe["quantization"]["linears"] == 2
        return
    with pytest.raises(ConfigError, match=r"nothing to quantize: .*; 2 matrices, such as 'W1', are inputs with a def"):
        quantize(source, tmp_path / "out.onnx", QConfig(WEIGHT_ONLY))
    with pytest.raises(ModelError, match=r"not a decoder .*; 2 matrices.*keep_initializers_as_inputs=False"):
        rotate_file(source, tmp_path / "out.onnx", QuarotConfig())


def test_an_empty_weight_is_left_as_it_is(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "W1"], ["p"], name="plain"),
        helper.make_node("MatMul", ["x", "A"], ["a"], name="A"),
        helper.make_node("MatMul", ["a", "B"], ["b"], name="B"),
        helper.make_node("Add", ["p", "b"], ["y"], name="add"),
    ]
    constants = {"W1": graphs.weights()["W1"], "A": np.zeros((graphs.IN, 0)), "B": np.zeros((0, graphs.HIDDEN))}
    proto = graphs.model(nodes, {"x": ["s", graphs.IN]}, {"y": ["s", graphs.HIDDEN]}, constants)
    source = io_models.write(proto, tmp_path / "in.onnx")
    for name, config in (
        ("weights", QConfig(WEIGHT_ONLY)),
        ("token", QConfig(PER_TOKEN)),
        ("4 bits", FOUR_BITS),
    ):
        x = np.random.default_rng(0).standard_normal((64, graphs.IN)).astype(np.float32)
        done = quantize(source, tmp_path / f"{name}.onnx", config, Reader({"x": x}))
        assert done.recipe["quantization"]["linears"] == 1
        y = graphs.run(done.saved.path, {"x": x})
        exact = x @ graphs.weights()["W1"]
        assert np.linalg.norm(y - exact) < 0.15 * np.linalg.norm(exact)


def test_the_shape_of_a_default_is_no_shape_of_the_input() -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "to"], ["r"], name="reshape"),
        helper.make_node("MatMul", ["x", "A"], ["y"], name="product"),
    ]
    proto = graphs.model(nodes, {"x": [4, 6]}, {"y": [4, "r"]}, {"to": np.array([2, 12]), "A": np.zeros((6, 0))})
    proto.graph.input.append(helper.make_tensor_value_info("to", 7, [2]))
    proto.graph.input.append(helper.make_tensor_value_info("A", 1, [6, "r"]))
    model = ir.from_proto(proto)
    values = {value.name: value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}
    shapes = Shapes(model)
    assert shapes.of(values["r"]) == (None, None)
    assert shapes.of(values["A"]) == (6, None)
    assert shapes.of(values["y"]) == (4, None)
