"""Attentions whose output Linear is not seen to write to the residual stream, and down projections of the same kind."""

from pathlib import Path

import cached_decoder as cached
import numpy as np
import onnx
import pytest
from command_line import Shell
from hand_decoder import Spec
from hand_decoder import build as by_hand
from strange_blocks import behind, encoded

from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import rotate
from quarot_onnx.sites.detect import detect
from quarot_onnx.sites.model import Kind, Sites, grouped

MODELS = {
    "tanh": lambda: behind(cached.build(), "o0"),
    "tanh in all": lambda: behind(behind(cached.build(), "o0"), "o1"),
    "post-LN": lambda: behind(cached.build(), "r0", "LayerNormalization", "b0g"),
}
DOWN = "seems to be an MLP's down projection, but is not seen to write to the residual stream"


def sites_of(model: onnx.ModelProto, folder: Path) -> Sites:
    return detect(model_io.load(cached.save(model, folder)))


@pytest.mark.parametrize("case", MODELS)
def test_r2_and_r3_need_no_stream(case: str, tmp_path: Path) -> None:
    sites = sites_of(MODELS[case](), tmp_path)
    places = {kind: count for kind, count in sites.counts().items() if kind != "R4"}
    assert (sites.layers, places) == (2, {"R1": 0, "R2": 2, "R3": 2})
    assert {entry.kind for entry in sites.left_out} <= {Kind.R1, Kind.R4}
    assert {entry.node for entry in sites.why_not(Kind.R4)} <= {"node_d0", "node_d1"}
    assert all(attention.value_cache and attention.key_cache for attention in sites.attentions)


@pytest.mark.parametrize("case", MODELS)
def test_they_are_rotated(case: str, tmp_path: Path) -> None:
    source = cached.save(MODELS[case](), tmp_path / "source")
    rotate(source, tmp_path / "m.onnx", QuarotConfig(r1=False, r2=True, r3=True, r4=False))
    before, after = (cached.run(path, {"input_ids": cached.IDS}) for path in (source, tmp_path / "m.onnx"))
    assert cached.difference(before["logits"], after["logits"]) < 1e-5
    assert cached.difference(before["present.0.key"], after["present.0.key"]) > 0.1


def test_inspect_counts_them(shell: Shell, tmp_path: Path) -> None:
    found = shell.ok("inspect", cached.save(MODELS["post-LN"](), tmp_path), "--json").json
    assert (found["layers"], found["sites"]) == (2, {"R1": 0, "R2": 2, "R3": 2, "R4": 0})


def test_one_behind_which_another_linear_writes(tmp_path: Path) -> None:
    """The writer behind the attention's own output Linear is no MLP's."""
    model = cached.build()
    square = np.eye(cached.HIDDEN, dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(square, "second"))
    sites = sites_of(behind(behind(model, "o0"), "o0_Tanh", "MatMul", "second"), tmp_path)
    assert sites.counts() == {"R1": 5, "R2": 2, "R3": 2, "R4": 2}
    assert [linear.name for linear in sites.mlps] == ["node_d0", "node_d1"]


def test_an_encoder_in_the_graph_is_no_layer(tmp_path: Path) -> None:
    alone, beside = sites_of(cached.build(cross="made"), tmp_path / "a"), sites_of(encoded(), tmp_path / "b")
    assert [a.name for a in beside.attentions] == [a.name for a in alone.attentions]
    assert beside.counts() == alone.counts()
    own = [entry for entry in beside.left_out if entry.node == "node_encoder_pr0"]
    assert [entry.kind for entry in own] == [Kind.R2, Kind.R3]
    assert all(entry.reason.startswith("it works on nothing of the residual stream") for entry in own)


def test_down_projections_behind_a_layernorm_are_named(shell: Shell, tmp_path: Path) -> None:
    path = cached.save(MODELS["post-LN"](), tmp_path)
    sites = detect(model_io.load(path))
    assert [(entry.node, entry.reason) for entry in sites.why_not(Kind.R4)] == [("node_d0", DOWN), ("node_d1", DOWN)]
    said = shell.fails("rotate", path, tmp_path / "m.onnx", "--no-r1", "--no-r2", "--r4")
    assert f"R4 is impossible in this model: 2 places, the first node_d0: {DOWN}; leave R4 out" in said


@pytest.mark.parametrize("linear", ["matmul", "bias", "gemm"])
def test_a_down_projection_whose_result_is_weighed_is_named(linear: str, tmp_path: Path) -> None:
    """As an expert's is."""
    written = {"matmul": "mlp0_down_out", "bias": "mlp0_down_biased", "gemm": "mlp0_down_out"}[linear]
    sites = sites_of(behind(by_hand(Spec(linear=linear)), written), tmp_path)
    name = "node_mlp0_down_gemm" if linear == "gemm" else "node_mlp0_down_out"
    assert grouped(sites.why_not(Kind.R4)) == [f"{name}: {DOWN}"]


@pytest.mark.parametrize("attention", ["gqa", "gated", "forked"])
def test_output_linears_are_no_down_projections(attention: str, tmp_path: Path) -> None:
    sites = sites_of(behind(by_hand(Spec(attention=attention)), "o_out"), tmp_path)
    assert not list(sites.why_not(Kind.R4))
    assert sites.layers == 1
