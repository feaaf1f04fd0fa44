"""What cannot be rotated is refused before anything changes, with the node and the reason."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import exports
import hand_decoder
import numpy as np
import onnx_ir as ir
import pytest
from hand_decoder import Spec
from rotating import check_equivalent, request, rotate

from quarot_onnx.errors import ConfigError
from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.io import model_io
from quarot_onnx.rotation.apply import apply_plan
from quarot_onnx.rotation.plan import Demand, RotationRequest, plan_rotation
from quarot_onnx.sites.detect import detect
from quarot_onnx.sites.model import Kind, OnlinePair

IF_POSSIBLE = Demand.IF_POSSIBLE


def refused(source: Path, wanted: RotationRequest, message: str) -> None:
    """Planning raises, and the model is what it was."""
    model = model_io.load(source)
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(ConfigError, match=message):
        apply_plan(model, plan_rotation(detect(model), wanted))
    assert ir.to_proto(model).SerializeToString() == before


GEMMA, OLMO, NEOX = (lambda arch=arch: exports.optimum_export(arch) for arch in ("gemma3_text", "olmo2", "gpt_neox"))


MANY = r"(\d+ places, the first )?"


@pytest.mark.parametrize(
    ("build", "node", "reason"),
    [
        (GEMMA, "/model/layers.0/post_attention_layernorm/Mul_1", "normalises a block's output before it is added"),
        (OLMO, "/model/layers.0/self_attn/q_proj/MatMul", "reads the residual stream without a norm before it"),
        (NEOX, "/gpt_neox/layers.0/input_layernorm/LayerNormalization", "is a LayerNorm: it subtracts the mean"),
    ],
    ids=["gemma3", "olmo2", "gpt_neox"],
)
def test_r1_in_post_norm_and_layer_norm_decoders(
    build: Callable[[], Path], node: str, reason: str, tmp_path: Path
) -> None:
    source = build()
    refused(source, request(Kind.R1), rf"R1 is impossible in this model: {MANY}{node}: {reason}")
    target, sites, plan = rotate(source, tmp_path)
    assert re.match(rf"R1 left out: {MANY}{node}: {reason}", plan.notes[0])
    assert sum(note.startswith("R1") for note in plan.notes) == len({entry.reason for entry in sites.why_not(Kind.R1)})
    assert dict(plan.counts) == {k: n for k, n in sites.counts().items() if n}
    assert plan.counts["R4"] == plan.counts["R3"] == 2
    check_equivalent(source, target)


def test_values_interleaved_with_queries_and_keys_are_left_alone() -> None:
    """GPT-NeoX stores [q k v] for each head: V is no range of columns. A column range would be wrong in silence."""
    for source in (exports.optimum_export("gpt_neox"), exports.dynamo_export("gpt_neox")):
        refused(source, request(Kind.R2), "R2 is impossible in this model: .* columns")


def test_r_matrix_dim_names_both_numbers() -> None:
    source = exports.optimum_export("llama")
    refused(source, request(Kind.R1, r_matrix_dim=4096), r"r_matrix_dim is 4096, but the graph's hidden size is 64")
    plan = plan_rotation(detect(model_io.load(source)), request(Kind.R1, r_matrix_dim=64))
    assert plan.counts == {"R1": 5}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("r1", "R1's matrix mine is of size 12, but the graph needs 64"),
        ("r2", "R2's matrix mine is of size 12, but .* 32"),
    ],
)
def test_a_given_matrix_of_the_wrong_size(option: str, message: str) -> None:
    wrong = Rotation.dense(np.eye(12), origin="mine")
    refused(exports.optimum_export("llama"), request(**{option: wrong}), message)


def test_a_block_size_that_does_not_divide() -> None:
    refused(exports.optimum_export("llama"), request(block_sizes={Kind.R1: 48}), "block_size=48 does not divide")


def test_a_late_refusal_leaves_no_half_done_rotation(tmp_path: Path) -> None:
    """R1 and R2 are planned before R4 fails."""
    source = hand_decoder.write(tmp_path, Spec(intermediate=37))
    refused(source, request(), "R4 is impossible in this model: node_mlp0_down_out: no Hadamard matrix of order 37")


def test_an_order_without_a_hadamard_matrix(tmp_path: Path) -> None:
    for number, intermediate in enumerate((37, 2 * 37)):
        source = hand_decoder.write(tmp_path, Spec(intermediate=intermediate))
        target, _, plan = rotate(source, tmp_path / str(number))
        assert "R4" not in plan.counts
        assert plan.notes == (
            (
                f"R4 left out: node_mlp0_down_out: no Hadamard matrix of order {intermediate} is known, "
                f"nor of a divisor above {1 + number}"
            ),
        )
        check_equivalent(source, target)


def test_a_block_diagonal_fall_back_is_reported(tmp_path: Path) -> None:
    source = hand_decoder.write(tmp_path, Spec(intermediate=12 * 7))
    target, _, plan = rotate(source, tmp_path, request(Kind.R4))
    assert plan.rotations["R4[84]"].block_size is None  # 84 = P1(83)
    source = hand_decoder.write(tmp_path, Spec(intermediate=4 * 23))
    target, _, plan = rotate(source, tmp_path / "fallback", request(Kind.R4))
    assert plan.rotations["R4[92]"].block_size == 4
    missing = "no Hadamard matrix of order 92 that this tool can build"
    assert plan.notes == (f"R4[92]: {missing}; block-diagonal with blocks of 4 instead",)
    check_equivalent(source, target)


def test_a_kind_without_a_place(tmp_path: Path) -> None:
    model = model_io.load(hand_decoder.write(tmp_path))
    sites = dataclasses.replace(detect(model), mlps=())
    with pytest.raises(ConfigError, match="R4 is impossible in this model: the graph has no place for it"):
        plan_rotation(sites, request(Kind.R4))
    assert plan_rotation(sites, request(Kind.R4, demand=IF_POSSIBLE)).edits == ()


def test_an_online_pair_cannot_repeat_r4(tmp_path: Path) -> None:
    model = model_io.load(hand_decoder.write(tmp_path))
    found = detect(model)
    sites = dataclasses.replace(found, online_pairs=(OnlinePair(found.mlps[0]),))
    with pytest.raises(ConfigError, match="online_pairs names node_mlp0_down_out, which already gets R4"):
        plan_rotation(sites, request(Kind.R4))
    assert plan_rotation(sites, RotationRequest({})).counts == {"online_pairs": 1}


def test_an_online_pair_of_an_odd_size_is_an_error(tmp_path: Path) -> None:
    model = model_io.load(hand_decoder.write(tmp_path, Spec(intermediate=37)))
    found = detect(model)
    sites = dataclasses.replace(found, online_pairs=(OnlinePair(found.mlps[0]),))
    with pytest.raises(ConfigError, match="online_pairs: node_mlp0_down_out: no Hadamard matrix of order 37 is known"):
        plan_rotation(sites, RotationRequest({}))


def test_a_plan_changes_nothing(tmp_path: Path) -> None:
    model = model_io.load(exports.optimum_export("qwen2"))
    before = ir.to_proto(model).SerializeToString()
    assert plan_rotation(detect(model), request()).edits
    assert ir.to_proto(model).SerializeToString() == before
