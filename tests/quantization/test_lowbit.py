"""From a configuration to jobs, options and the fingerprint of a run."""

from pathlib import Path

import linear_graphs as graphs
import numpy as np
import onnx
import pytest
from lowbit_runs import METHODS, TOKEN, config_for, text_reader

from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import GPTQConfig, QuarotConfig, RTNConfig
from quarot_onnx.config.spec import (
    Int2Spec,
    Int4Spec,
    Int8Spec,
    QLayerConfig,
    QTensorConfig,
    UInt3Spec,
    UInt4Spec,
    UInt8Spec,
)
from quarot_onnx.errors import CalibrationError, ConfigError, ModelError
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import quantize
from quarot_onnx.quantization import static_ranges
from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.quantization.select import select
from quarot_onnx.rounding import lowbit
from quarot_onnx.sites.detect import Survey

SAMPLES = [{"x": np.arange(6.0).reshape(2, 3)}]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Int4Spec(), WeightScheme(4)),
        (Int2Spec(group_size=32), WeightScheme(2, group_size=32)),
        (UInt3Spec(), WeightScheme(3, symmetric=False, signed=False)),
        (UInt4Spec(symmetric=True, group_size=16), WeightScheme(4, signed=False, group_size=16)),
        (Int4Spec(symmetric=False), WeightScheme(4, symmetric=False)),
        (Int8Spec(), WeightScheme(8, per_channel=False)),
        (Int8Spec(quant_granularity="Channel"), WeightScheme(8)),
    ],
)
def test_schemes(spec: QTensorConfig, expected: WeightScheme) -> None:
    assert lowbit.scheme(spec) == expected


def test_linears_that_share_a_static_grid_share_the_object(llama_optimum: Path) -> None:
    """Stages are parted by it: q, k and v must not be taken for three."""
    config = QConfig(QLayerConfig(UInt8Spec(), Int8Spec()), algo_config=[GPTQConfig()])
    model = model_io.load(llama_optimum)
    selection = select(Survey(model), config)
    reader = text_reader(llama_optimum, samples=2, seq_len=16)
    ranges = static_ranges.calibrate(selection, reader)
    jobs = lowbit.Task(selection, config, ranges, [], llama_optimum).jobs()
    assert [job.linear for job in jobs] == [job.linear for job in selection.linears]
    q, k, v, o = jobs[:4]
    assert q.activation is k.activation is v.activation is not None
    assert o.activation is not q.activation


def test_samples_are_taken_only_where_they_are_needed(llama_optimum: Path) -> None:
    reader = text_reader(llama_optimum, samples=5, seq_len=16)
    assert lowbit.calibration_samples(config_for("rtn", "nbits"), reader) == []
    assert lowbit.calibration_samples(config_for("gptq", "nbits"), None) == []
    assert len(lowbit.calibration_samples(config_for("gptq", "nbits"), reader)) == 5
    samples = lowbit.calibration_samples(config_for("gptq", "nbits", CalibDataSize=2), reader)
    assert [feeds["input_ids"].shape for feeds in samples] == [(1, 16)] * 2


def test_equal_fingerprints_equal_results(tmp_path: Path) -> None:
    file, matrix = tmp_path / "m.onnx", tmp_path / "r.npy"
    file.write_bytes(b"12")
    matrix.write_bytes(b"12")
    config = config_for("gptq", "nbits", quarot=QuarotConfig(r1_matrix_path=matrix))
    base = lowbit.fingerprint([file], config, SAMPLES)
    assert base == lowbit.fingerprint([file], config.model_copy(), [dict(SAMPLES[0])])
    others = [
        lowbit.fingerprint([file], config_for("gptaq", "nbits"), SAMPLES),
        lowbit.fingerprint([file], config, [{"x": SAMPLES[0]["x"].astype(np.float32)}]),
        lowbit.fingerprint([file], config, [{"x": SAMPLES[0]["x"].reshape(3, 2)}]),
        lowbit.fingerprint([file], config, [{"y": SAMPLES[0]["x"]}]),
        lowbit.fingerprint([file], config, [{"x": SAMPLES[0]["x"] + np.eye(2, 3)}]),
        lowbit.fingerprint([], config, SAMPLES),
        lowbit.fingerprint([file], config, SAMPLES, 4),
    ]
    file.write_bytes(b"123")
    others.append(lowbit.fingerprint([file], config, SAMPLES))
    file.write_bytes(b"12")
    matrix.write_bytes(b"123")
    others.append(lowbit.fingerprint([file], config, SAMPLES))
    assert all(other != base for other in others)


@pytest.mark.parametrize(("size", "hint"), [(48, "such as 16 or 32 or 64"), (128, "such as 16 or 32 or 64")])
def test_groups_must_divide(size: int, hint: str, llama_optimum: Path) -> None:
    model = model_io.load(llama_optimum)
    for what, layer in (
        ("weight", QLayerConfig(weight=Int4Spec(group_size=size))),
        ("activation", QLayerConfig(UInt4Spec(quant_granularity="Token", group_size=size), Int4Spec())),
    ):
        config = QConfig(layer, output_format="fake")
        with pytest.raises(
            ConfigError, match=rf"group_size={size} of the {what} .* 64 .*'/model/layers.0.*; use .*{hint}"
        ):
            lowbit.check(select(Survey(model), config), config, None)
    fitting = QConfig(QLayerConfig(weight=Int4Spec(group_size=32)), output_format="nbits")
    lowbit.check(select(Survey(model), fitting), fitting, None)


@pytest.mark.parametrize("method", METHODS)
def test_a_reader_is_needed_for_statistics(method: str, llama_optimum: Path) -> None:
    config = config_for(method, "nbits")
    selection = select(Survey(model_io.load(llama_optimum)), config)
    if method == "rtn":
        lowbit.check(selection, config, None)
        return
    with pytest.raises(CalibrationError, match=f"{method} needs calibration data: pass .*--weights rtn"):
        lowbit.check(selection, config, None)
    with pytest.raises(CalibrationError, match="no get_next"):
        lowbit.check(selection, config, "text.txt")  # type: ignore[arg-type]


def test_nodes_of_one_name_are_refused(tmp_path: Path) -> None:
    """Their rounded weights would be taken for each other's; nodes without names are told apart by their outputs."""
    proto = graphs.two_linears()
    for name in ("same", ""):
        for node in proto.graph.node:
            if node.op_type == "MatMul":
                node.name = name
        onnx.save(proto, tmp_path / "m.onnx")
        config = QConfig(QLayerConfig(TOKEN, Int4Spec()), algo_config=[RTNConfig()])
        if name:
            with pytest.raises(ModelError, match=r"nodes of one name, 'same' \(2 nodes\)"):
                quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", config)
        else:
            quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", config)


class Feeds:
    """A reader of random rows."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self._feeds = iter([{"x": rng.standard_normal((1, 8, graphs.IN)).astype(np.float32)} for _ in range(count)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


@pytest.mark.parametrize("method", ["gptq", "gptaq", "qronos"])
def test_any_graph_of_linears_will_do(method: str, tmp_path: Path) -> None:
    """No decoder, no token ids, a stage that reads the graph's own input."""
    onnx.save(graphs.two_linears(), tmp_path / "m.onnx")
    quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", config_for(method, "w4a8"), Feeds(4))
    x = np.random.default_rng(1).standard_normal((1, 5, graphs.IN)).astype(np.float32)
    actual, expected = (graphs.run(tmp_path / name, {"x": x}) for name in ("q.onnx", "m.onnx"))
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert 1e-3 < error < 0.2  # two Linears of 4 bits, some 7 % each
    done = quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", config_for(method, "w4a8"), Feeds(2))
    assert any("16 calibration tokens are fewer than the 24 columns of 'down'" in note for note in done.notes)
