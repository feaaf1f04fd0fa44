"""``inspect`` counts the places that a rotation is planned for, and no others."""

from pathlib import Path
from typing import Any

import exports
import hand_decoder
import numpy as np
import onnx
import pytest
from command_line import Shell
from hand_decoder import Spec
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.errors import ConfigError
from quarot_onnx.hadamard.orders import missing, usual_block
from quarot_onnx.io import model_io
from quarot_onnx.rotation.plan import Demand, RotationRequest, plan_rotation
from quarot_onnx.rotation_config.config_file import read_sites
from quarot_onnx.sites.detect import Survey, detect
from quarot_onnx.sites.model import Kind

# The hand-written decoder has hidden 24 and heads of 8.
EVERYTHING = RotationRequest(dict.fromkeys(Kind, Demand.IF_POSSIBLE))
FLOAT = TensorProto.FLOAT
IMPOSSIBLE = (37, 2 * 37, 3 * 7 * 11)


def inspected(shell: Shell, source: Path, *options: object) -> dict[str, Any]:
    return shell.ok("inspect", source, "--json", *options).json


@pytest.mark.parametrize("intermediate", [20, 37, 74, 92, 231, 428])
def test_inspect_counts_what_is_planned(intermediate: int, shell: Shell, tmp_path: Path) -> None:
    source = hand_decoder.write(tmp_path, Spec(intermediate=intermediate))
    plan = plan_rotation(detect(model_io.load(source)), EVERYTHING)
    told = inspected(shell, source)
    assert {kind: count for kind, count in told["sites"].items() if count} == dict(plan.counts)
    assert ("R4" in plan.counts) == (intermediate not in IMPOSSIBLE)
    left_out = [entry for entry in told["left_out"] if entry["rotation"] == "R4"]
    assert bool(left_out) == (intermediate in IMPOSSIBLE)
    described = {use["rotation"] for use in told["hadamards"]}
    assert described == set(plan.counts)
    for entry in left_out:
        assert any(entry["reason"] in note for note in plan.notes)


def with_branches(source: Path) -> Path:
    """The same model with two products of its logits in one branch of an If, and none in the other."""
    model = onnx.load(source)
    width = hand_decoder.VOCAB
    for name in ("first", "second"):
        weight = np.random.default_rng(1).standard_normal((width, width)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    products = [
        helper.make_node("MatMul", ["logits", "first"], ["once"], name="product_1"),
        helper.make_node("MatMul", ["once", "second"], ["twice"], name="product_2"),
    ]
    neither = [helper.make_node("Identity", ["logits"], ["none"], name="pass")]
    branches = {
        f"{name}_branch": helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(out, FLOAT, None)])
        for name, nodes, out in (("then", products, "twice"), ("else", neither, "none"))
    }
    model.graph.node.append(helper.make_node("If", ["yes"], ["more"], name="choice", **branches))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((), bool), "yes"))
    model.graph.output.append(helper.make_tensor_value_info("more", FLOAT, None))
    onnx.save(model, source)
    return source


def test_linears_inside_branches_are_counted(shell: Shell, tmp_path: Path) -> None:
    source = hand_decoder.write(tmp_path)
    before = inspected(shell, source)
    assert before["linears_in_branches"] == []
    with_branches(source)
    told = [{"node": "choice", "op_type": "If", "linears": 2}]
    assert inspected(shell, source) == before | {
        "linears_in_branches": told,
        "nodes": before["nodes"] + 1,
        "weight_bytes": before["weight_bytes"] + 2 * 4 * hand_decoder.VOCAB**2 + 1,
    }
    line = "left as they are: 2 Linears inside the If choice"
    assert line in shell.ok("inspect", source).out.splitlines()
    shell.ok("quantize", source, tmp_path / "q.onnx", "--scheme", "w8", "--no-rotate", "--no-check")
    assert inspected(shell, tmp_path / "q.onnx")["linears_in_branches"] == told
    assert line in shell.ok("inspect", tmp_path / "q.onnx").out.splitlines()


def test_an_odd_model_has_no_place_at_all(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_decoder, "HIDDEN", 18)
    monkeypatch.setattr(hand_decoder, "HEAD_DIM", 18)
    source = hand_decoder.write(tmp_path, Spec(intermediate=231))
    told = inspected(shell, source)
    assert set(told["sites"].values()) == {0}
    assert {entry["rotation"] for entry in told["left_out"]} >= {"R1", "R2", "R4"}
    assert "no rotation is left to do" in shell.fails("rotate", source, tmp_path / "r.onnx")


def test_a_written_config_states_what_can_be_done(shell: Shell, tmp_path: Path) -> None:
    source = hand_decoder.write(tmp_path, Spec(intermediate=231))
    config = tmp_path / "places.json"
    inspected(shell, source, "--write-config", config)
    assert read_sites(config, Survey(model_io.load(source))).sites.counts()["R4"] == 0
    shell.ok("rotate", source, tmp_path / "r.onnx", "--rotation-config", config, "--no-r3")


def test_blocks_that_a_file_asks_for_are_told(shell: Shell, tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    config = tmp_path / "blocks.json"
    config.write_text('{"format": "quarot_onnx/1", "R1": {"block_size": 16}}')
    (use,) = inspected(shell, source, "--rotation-config", config)["hadamards"]
    assert "16" in use["construction"]


@pytest.mark.parametrize("order", [92, 116, 428])
def test_matrices_of_other_kinds_are_not_said_to_be_unknown(order: int) -> None:
    assert usual_block(order) == 4
    assert missing(order) == f"no Hadamard matrix of order {order} that this tool can build"


@pytest.mark.parametrize(
    ("size", "block"), [(1, None), (2, 2), (18, None), (90, None), (231, None), (84, 84), (100, 100)]
)
def test_blocks_of_one_or_two_are_no_rotation(size: int, block: int | None) -> None:
    assert usual_block(size) == block


def test_blocks_of_one_cannot_be_asked_for(shell: Shell, tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    with pytest.raises(ConfigError, match=r"block_size=1: blocks of 1 are no rotation"):
        QuarotConfig(block_size=1)
    assert "blocks of 1 are no rotation" in shell.fails("rotate", source, tmp_path / "r.onnx", "--block-size", 1)
    for content in ({"R1": {"block_size": 1}}, {"R4": [{"node": "x", "block_size": 1}]}):
        with pytest.raises(ConfigError, match="blocks of 1 are no rotation"):
            read_sites({"format": "quarot_onnx/1", **content}, Survey(model_io.load(source)))
    assert (
        Kind.R1 in read_sites({"format": "quarot_onnx/1", "R1": {"block_size": 2}}, Survey(model_io.load(source))).kinds
    )
