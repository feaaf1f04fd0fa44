"""R4 goes where the input of a down projection is quantized, and nowhere else unless it was asked for."""

import json
from pathlib import Path
from typing import Any

import exports
import pytest

from quarot_onnx.config import Int8Spec, QConfig, QLayerConfig, QuarotConfig, UInt8Spec
from quarot_onnx.errors import ConfigError
from quarot_onnx.graph.tags import is_online
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import Outcome, quantize, rotate
from quarot_onnx.rotation_config.config_file import write_config
from quarot_onnx.sites.detect import detect

W8 = QLayerConfig(weight=Int8Spec(quant_granularity="Channel"))
PER_TOKEN = QLayerConfig(UInt8Spec(symmetric=True, quant_granularity="Token"), W8.weight)
FIRST, SECOND = (f"/model/layers.{i}/mlp/down_proj/MatMul" for i in (0, 1))
COST = "costs time at every step and gains little"


def run(folder: Path, config: QConfig, source: Path | None = None) -> tuple[Outcome, set[str]]:
    """What was done, and the down projections that R4 went before."""
    done = quantize(source or exports.optimum_export("llama"), folder / "q.onnx", config, verify=False, check=None)
    marked = [node.name or "" for node in model_io.load(folder / "q.onnx").graph if is_online(node)]
    return done, {name for name in (FIRST, SECOND) if any(item.startswith(name) for item in marked)}


@pytest.mark.parametrize(
    ("settings", "rotated"),
    [
        ({"exclude": [FIRST]}, {SECOND}),
        ({"exclude": ["*layers.1*"]}, {FIRST}),
        ({"exclude": ["^.*down_proj.*"]}, set()),
        ({"specific_layer_config": {None: [SECOND]}}, {FIRST}),
        ({"specific_layer_config": [(W8, [FIRST])]}, {SECOND}),
        ({"NodesToQuantize": [FIRST, "*q_proj*"]}, {FIRST}),
        ({"global_config": None, "specific_layer_config": [(PER_TOKEN, ["*q_proj*", SECOND])]}, {SECOND}),
        ({}, {FIRST, SECOND}),
    ],
)
def test_r4_is_left_out_before_float_inputs(settings: dict[str, Any], rotated: set[str], tmp_path: Path) -> None:
    config = QConfig(**{"global_config": PER_TOKEN, "algo_config": [QuarotConfig()], **settings})
    done, found = run(tmp_path, config)
    assert found == rotated
    counts = json.loads((tmp_path / "q.quarot.json").read_text())["rotation"]["counts"]
    assert counts.get("R4", 0) == len(rotated)
    told = [note for note in done.notes if note.startswith("R4 ") and "its input stays in float" in note]
    assert len(told) == (len(rotated) < 2)
    assert not [note for note in done.notes if COST in note]


def test_r4_that_is_asked_for_is_done_and_its_cost_told(tmp_path: Path) -> None:
    places = tmp_path / "places.json"
    write_config(detect(model_io.load(exports.optimum_export("llama"))), places)
    for rotation in (QuarotConfig(r4=True), QuarotConfig(r_config_path=places, r3=False)):
        done, found = run(tmp_path, QConfig(PER_TOKEN, exclude=[FIRST], algo_config=[rotation]))
        assert found == {FIRST, SECOND}
        (note,) = [note for note in done.notes if COST in note]
        assert FIRST in note
        assert SECOND not in note
    done, found = run(tmp_path, QConfig(W8, algo_config=[QuarotConfig(r4=True)]))
    assert found == {FIRST, SECOND}
    (note,) = [note for note in done.notes if COST in note]
    assert f"{FIRST} and 1 more" in note


def test_a_model_that_was_rotated_before(tmp_path: Path) -> None:
    rotate(exports.optimum_export("llama"), tmp_path / "r.onnx", QuarotConfig(), verify=False)
    done, _ = run(tmp_path, QConfig(PER_TOKEN, exclude=[SECOND]), tmp_path / "r.onnx")
    (note,) = [note for note in done.notes if COST in note]
    assert SECOND in note
    assert FIRST not in note
    done, _ = run(tmp_path, QConfig(PER_TOKEN), tmp_path / "r.onnx")
    assert not [note for note in done.notes if COST in note]


def test_no_rotation_is_left_where_r4_alone_was_wanted(tmp_path: Path) -> None:
    config = QConfig(PER_TOKEN, exclude=["*down_proj*"], algo_config=[QuarotConfig(r1=False, r2=False)])
    with pytest.raises(ConfigError, match=r"no rotation is left to do: R4 left out: .*its input stays in float"):
        run(tmp_path, config)
