"""Padding of calibration samples has no part in what is written, not in a single byte."""

from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import pytest
import tiny_decoders as tiny

from quarot_onnx import pipeline
from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.ranges import RangeRule, collect_ranges
from quarot_onnx.calibration.readers import SampleReader
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import GPTAQConfig, GPTQConfig, QronosConfig
from quarot_onnx.config.enums import CalibMethod
from quarot_onnx.config.spec import Int4Spec, Int8Spec, QLayerConfig, UInt4Spec, UInt8Spec

TEXTS = [np.random.default_rng(k).integers(0, 256, n).tolist() for k, n in enumerate([59, 7] * 8)]
TOKEN = UInt8Spec(symmetric=True, quant_granularity="Token")

CONFIGS = {
    "static minmax": QConfig(QLayerConfig(UInt8Spec(), Int8Spec())),
    "static percentile": QConfig(QLayerConfig(UInt8Spec(calibration_method="Percentile"), Int8Spec())),
    "gptq": QConfig(QLayerConfig(weight=Int4Spec()), algo_config=[GPTQConfig()]),
    "gptaq per token": QConfig(QLayerConfig(TOKEN, Int4Spec()), algo_config=[GPTAQConfig()], output_format="w4a8"),
    "qronos": QConfig(
        QLayerConfig(UInt4Spec(quant_granularity="Token"), Int4Spec()),
        algo_config=[QronosConfig()],
        output_format="fake",
    ),
    "gptaq static": QConfig(QLayerConfig(UInt8Spec(), Int4Spec()), algo_config=[GPTAQConfig()]),
}


def feed(inputs: ModelInputs, texts: list[list[int]], side: str, pad: int, length: int) -> Feeds:
    """A batch, filled up with pads."""
    ids, shown, place = np.full((len(texts), length), pad), *(np.zeros((len(texts), length), np.int64) for _ in "mp")
    for row, text in enumerate(texts):
        where = slice(length - len(text), None) if side == "left" else slice(len(text))
        ids[row, where], shown[row, where], place[row, where] = text, 1, np.arange(len(text))
    feeds, known = inputs.feed(ids), {"attention_mask": shown, "position_ids": place}
    return feeds | {name: known[name].astype(feeds[name].dtype) for name in known if name in feeds}


def one_by_one(inputs: ModelInputs) -> list[Feeds]:
    return [feed(inputs, [text], "right", 0, len(text)) for text in TEXTS]


def in_pairs(inputs: ModelInputs, side: str, pad: int) -> list[Feeds]:
    return [feed(inputs, TEXTS[k : k + 2], side, pad, 64) for k in range(0, len(TEXTS), 2)]


def written(source: Path, target: Path, config: QConfig, samples: list[Feeds]) -> bytes:
    pipeline.quantize(source, target, config, SampleReader(samples), check=None)
    return b"".join(path.read_bytes() for path in sorted(target.parent.glob(f"{target.name}*")))


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_leaves_no_trace(llama_optimum: Path, tmp_path: Path, name: str) -> None:
    inputs, config = ModelInputs.from_path(llama_optimum), CONFIGS[name]
    plain = written(llama_optimum, tmp_path / "model.onnx", config, one_by_one(inputs))
    for side in ("left", "right"):
        assert written(llama_optimum, tmp_path / "model.onnx", config, in_pairs(inputs, side, 120)) == plain
    other = [feeds | {"input_ids": feeds["input_ids"] * 0 + 33} for feeds in one_by_one(inputs)]
    assert written(llama_optimum, tmp_path / "model.onnx", config, other) != plain, "the text itself does count"


@pytest.mark.parametrize("side", ["left", "right"])
def test_graphs_that_read_the_mask_as_a_length(side: str, tmp_path: Path) -> None:
    """GroupQueryAttention takes the first positions for the text, wherever the pads are."""
    source = exports.genai_like()
    inputs, config = ModelInputs.from_path(source), CONFIGS["gptq"]
    plain = written(source, tmp_path / "model.onnx", config, one_by_one(inputs))
    assert written(source, tmp_path / "model.onnx", config, in_pairs(inputs, side, 120)) == plain


def test_pads_are_no_tokens_for_the_note(llama_optimum: Path, tmp_path: Path) -> None:
    inputs = ModelInputs.from_path(llama_optimum)
    few = [feed(inputs, [TEXTS[1]], "left", 120, 128) for _ in range(4)]
    done = pipeline.quantize(llama_optimum, tmp_path / "q.onnx", CONFIGS["gptq"], SampleReader(few), verify=False)
    assert any(note.startswith("28 calibration tokens are fewer than the 128 columns of ") for note in done.notes)


@pytest.mark.parametrize("method", [m for m in CalibMethod.supported() if m is not CalibMethod.Auto])
@pytest.mark.parametrize("side", ["left", "right"])
def test_ranges_of_graphs_with_fixed_lengths(method: CalibMethod, side: str, tmp_path: Path) -> None:
    proto = tiny.build(tiny.Spec(cache=False))
    free = tiny.save(proto, tmp_path / "free")
    inputs = ModelInputs.from_path(free)
    texts = [[3, 4, 5, 6, 7], [8, 9, 10]]
    for value in (*proto.graph.input, *proto.graph.output):
        for dim, length in zip(value.type.tensor_type.shape.dim, (2, 8), strict=False):
            dim.dim_value = length
    fixed = tiny.save(proto, tmp_path / "fixed")

    def ranges(path: Path, samples: list[Feeds]) -> Any:
        return collect_ranges(path, ["x", "context", "h"], SampleReader(samples), rule=RangeRule(method, 90.0))

    found = [ranges(fixed, [feed(inputs, texts, side, pad, 8)]) for pad in (0, 31)]
    assert found[0] == found[1]
    alone = ranges(free, [feed(inputs, [text], "right", 0, len(text)) for text in texts])
    assert found[0] == alone
    shown = feed(inputs, texts, side, 31, 8)
    assert ranges(fixed, [shown | {"attention_mask": np.ones((2, 8), np.int64)}]) != alone


@pytest.mark.parametrize("side", ["left", "right"])
def test_rounding_of_graphs_with_fixed_lengths(llama_optimum: Path, tmp_path: Path, side: str) -> None:
    """A prefill of two rows of 64 and no other: the samples run as they are, and their visible rows are summed up."""
    proto = onnx.load(llama_optimum)
    for value in proto.graph.input:
        for dim, length in zip(value.type.tensor_type.shape.dim, (2, 64), strict=False):
            if "past" not in value.name:
                dim.dim_value = length
    source = tmp_path / "fixed" / "model.onnx"
    source.parent.mkdir()
    onnx.save(proto, source)
    inputs, config = ModelInputs.from_path(llama_optimum), CONFIGS["gptaq static"]
    first, second = (written(source, tmp_path / "model.onnx", config, in_pairs(inputs, side, pad)) for pad in (120, 33))
    assert first == second
    shown = [feeds | {"attention_mask": np.ones_like(feeds["attention_mask"])} for feeds in in_pairs(inputs, side, 120)]
    assert written(source, tmp_path / "model.onnx", config, shown) != first
