"""Configurations of few bits for tests, and what a run of the pipeline rounded."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from quarot_onnx import pipeline
from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import (
    GPTAQConfig,
    GPTQConfig,
    QronosConfig,
    QuarotConfig,
    RoundingConfig,
    RTNConfig,
)
from quarot_onnx.config.spec import Int4Spec, QLayerConfig, UInt4Spec, UInt8Spec
from quarot_onnx.quantization.scheme import QuantizedWeight
from quarot_onnx.quantization.select import LinearJob, TableJob
from quarot_onnx.rounding import blockwise, lowbit
from quarot_onnx.rounding.store import RoundedWeight

TOKEN = UInt8Spec(symmetric=True, quant_granularity="Token")
METHODS: dict[str, Callable[[], RoundingConfig]] = {
    "rtn": RTNConfig,
    "gptq": GPTQConfig,
    "gptaq": GPTAQConfig,
    "qronos": QronosConfig,
}
LAYERS = {
    "w4a8": QLayerConfig(TOKEN, Int4Spec()),
    "nbits": QLayerConfig(weight=UInt4Spec(group_size=32)),
    "w8": QLayerConfig(TOKEN, UInt8Spec(symmetric=True, quant_granularity="Channel")),
    "fake": QLayerConfig(UInt4Spec(quant_granularity="Token", clip_ratio=0.9), Int4Spec()),
}


def config_for(method: str, form: str, *, quarot: QuarotConfig | None = None, **options: Any) -> QConfig:
    """A method in a format."""
    algorithms = [*([] if quarot is None else [quarot]), METHODS[method]()]
    return QConfig(LAYERS[form], algo_config=algorithms, output_format=form, **options)


@cache
def text_reader(path: Path, samples: int = 4, seq_len: int = 64, **options: Any) -> TextReader:
    """More tokens than any Linear of the tiny models has columns; made once, as cutting up the text takes a second."""
    return TextReader(path, samples=samples, seq_len=seq_len, **options)


@dataclass
class Seen:
    """What a run rounded.

    Attributes:
        weights: Integers by node name, as they are written.
        initializers: The name of each node's weight in the graph.
        calls: What was rounded in this run: nodes that are rounded together are joined by " + ".
        plain: Those among them that are rounded when they are written.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    initializers: dict[str, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)


@contextmanager
def watched(patch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Look over the shoulder of ``quantize``."""
    seen = Seen()
    weights_of, round_weight = lowbit.weights_of, blockwise.round_weight

    def all_of_them(config: QConfig, before: Mapping[str, RoundedWeight]) -> lowbit.RoundedOf:
        given = weights_of(config, before)

        def of(job: LinearJob | TableJob) -> RoundedWeight:
            weight = given(job)
            if job.name not in before:
                seen.calls.append(job.name)
                seen.plain.append(job.name)
            seen.weights[job.name] = weight.load()
            seen.initializers[job.name] = (
                job.table if isinstance(job, TableJob) else job.linear.weight
            ).value.name or ""
            return weight

        return of

    def one(*arguments: Any, helpers: None) -> Any:
        seen.calls.append(arguments[-1])
        return round_weight(*arguments, helpers=helpers)

    with patch.context() as inside:
        inside.setattr(pipeline.lowbit, "weights_of", all_of_them)
        inside.setattr(blockwise, "round_weight", one)
        yield seen
