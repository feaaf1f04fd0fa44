"""Activations of few bits on one fixed grid: from a configuration and calibration data to the finished model."""

from pathlib import Path
from typing import Any

import exports
import linear_graphs as graphs
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from quarot_onnx.calibration.ranges import Range, RangeRule
from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.config import (
    CalibMethod,
    GPTQConfig,
    Int3Spec,
    Int4Spec,
    Int8Spec,
    QConfig,
    QLayerConfig,
    QTensorConfig,
    UInt4Spec,
    UInt8Spec,
    spec_class,
)
from quarot_onnx.config.data_type import DataType
from quarot_onnx.emission.apply import activation_of
from quarot_onnx.errors import CalibrationError
from quarot_onnx.pipeline import quantize
from quarot_onnx.quantization.activations import FakeStatic, Static, round_trip

LAYERS = 2
RANGES = {("x", RangeRule()): Range(-3.0, 12.0), ("x", RangeRule(CalibMethod.Percentile, 99.0)): Range(-1.0, 2.0)}


class Reader:
    """Samples of different length."""

    def __init__(self) -> None:
        self.samples = [3 * np.random.default_rng(n).standard_normal((1, n, graphs.IN)).astype("f") for n in (14, 29)]
        self._feeds = iter([{"x": x} for x in self.samples])

    def get_next(self) -> Any:
        return next(self._feeds, None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    onnx.save(graphs.two_linears(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def per_tensor(owner: type[QTensorConfig], **keywords: Any) -> QTensorConfig:
    return owner(quant_granularity="Tensor", **keywords)


@pytest.mark.parametrize("data_type", [item for item in DataType if item.bits < 8])
def test_ranges_become_grids_of_two_to_the_bits_levels(data_type: DataType) -> None:
    owner, bits = spec_class(data_type), data_type.bits
    symmetric, asymmetric = (
        activation_of(per_tensor(owner, symmetric=flag, clip_ratio=0.5), "x", RANGES) for flag in (True, False)
    )
    assert symmetric == FakeStatic(bits, scale=float(np.float32(6 / (2 ** (bits - 1) - 1))))
    steps = 2**bits - 1
    # round(1.5 / (7.5 / steps)): a fifth of the range lies below 0.
    expected = FakeStatic(bits, symmetric=False, scale=float(np.float32(7.5 / steps)), zero_point=round(steps / 5))
    assert asymmetric == expected


def test_the_range_is_that_of_the_specs_own_calibration() -> None:
    spec = per_tensor(Int3Spec, calibration_method="Percentile", percentile=99.0)
    assert activation_of(spec, "x", RANGES) == FakeStatic(3, scale=float(np.float32(2 / 3)))


@pytest.mark.parametrize("owner", [Int8Spec, UInt8Spec])
def test_eight_bits_stay_integers(owner: type[QTensorConfig]) -> None:
    assert isinstance(activation_of(per_tensor(owner, clip_ratio=0.5), "x", RANGES), Static)


@pytest.mark.parametrize("owner", [Int4Spec, UInt4Spec])
def test_a_calibrated_model_computes_what_numpy_does(owner: type[QTensorConfig], source: Path, tmp_path: Path) -> None:
    config, reader = QConfig(QLayerConfig(per_tensor(owner, clip_ratio=0.8), Int8Spec())), Reader()
    quantize(source, tmp_path / "q.onnx", config, reader)
    seen = np.concatenate([x.ravel() for x in reader.samples])
    low, high = float(seen.min()) * 0.8, float(seen.max()) * 0.8
    grid = FakeStatic.for_range(low, high, 4, symmetric=owner is Int4Spec)
    model = onnx.load(tmp_path / "q.onnx")
    assert not {node.op_type for node in model.graph.node} & {"QuantizeLinear", "DequantizeLinear", "ReduceMax"}
    (name,) = [node.output[0] for node in model.graph.node if node.op_type == "Mul" and node.name.startswith("up/")]
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "seen.onnx")
    x = 4 * np.random.default_rng(9).standard_normal((1, 100, graphs.IN)).astype(np.float32)
    assert x.max() > high, "some values are cut off"
    actual = graphs.run(tmp_path / "seen.onnx", {"x": x})
    # The same float32 operations on the same float32 range.
    np.testing.assert_array_equal(actual, round_trip(x, grid))
    assert len(np.unique(actual)) == 2**4


def test_gptq_sees_what_the_grids_leave_of_activations(tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    layer = QLayerConfig(per_tensor(UInt4Spec), Int4Spec())
    found = []
    for aware in (True, False):
        config = QConfig(layer, algo_config=[GPTQConfig(enable_aq_calibration=aware)], exclude=["/lm_head/MatMul"])
        path = tmp_path / f"{aware}.onnx"
        quantize(source, path, config, TextReader(source, samples=8, seq_len=64), verify=False)
        counts = graphs.operators(path)
        # The inputs of qkv, o, gate and up, down; no Linear's output.
        assert counts["Round"] == counts["Clip"] == 4 * LAYERS
        weights = [
            numpy_helper.to_array(tensor)
            for tensor in onnx.load(path).graph.initializer
            if tensor.name.endswith("_rounded")
        ]
        found.append(np.concatenate([weight.ravel() for weight in weights]))
    assert not np.array_equal(*found)


def test_without_data_there_is_no_grid(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="static activation quantization needs calibration data"):
        quantize(source, tmp_path / "q.onnx", QConfig(QLayerConfig(per_tensor(UInt4Spec), Int4Spec())))
