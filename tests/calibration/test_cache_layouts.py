"""Caches whose positions are on another axis than the third are refused in true words, and early."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Shell
from exports import EXPORTS
from onnx import TensorProto, helper

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.io import model_io

SECOND = (0, 2, 1, 3)
"""[batch, positions, KV heads, head_dim]"""
LAST = (0, 1, 3, 2)


def turned(folder: Path, perm: tuple[int, ...] = SECOND) -> Path:
    """A decoder whose caches go in and come out with two axes exchanged."""
    source = EXPORTS["optimum llama"]()
    shutil.copytree(source.parent, folder)
    model = onnx.load(folder / source.name)
    graph = model.graph
    caches = [v for v in (*graph.input, *graph.output) if v.name.startswith(("past", "present"))]
    names = {value.name for value in caches}
    for node in graph.node:
        for side in (node.input, node.output):
            side[:] = [f"{name}/inside" if name in names else name for name in side]
    for value in caches:
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [dims[axis] for axis in perm]))
    before, after = [], []
    for name in sorted(names):
        past = name.startswith("past")
        ends = (name, f"{name}/inside") if past else (f"{name}/inside", name)
        (before if past else after).append(helper.make_node("Transpose", ends[:1], ends[1:], name=name, perm=perm))
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    onnx.save(model, folder / source.name)
    return folder / source.name


SAID = (
    "the cache 'past_key_values.0.key' ['batch_size', 'past_sequence_length', 2, 32] has its positions on axis 1, and "
    "only caches [batch, KV heads, positions, head_dim] can be fed: export it with such; "
)


@pytest.mark.parametrize(
    ("command", "more", "way"),
    [
        ("rotate", (), "give inputs for the proof (--feeds FILE.npz, feeds=), or go without it (--no-verify"),
        ("quantize", (), "give inputs for the proof (--feeds FILE.npz, feeds=), or go without it (--no-verify"),
        ("rotate", ("--prefix-ids", "7,3"), "go without a prefix"),
        ("quantize", ("--scheme", "w8a8-static", "--calib-text", "TEXT"), "give calibration samples (--feeds"),
        ("verify", (), "give the inputs (--feeds FILE.npz)"),
        ("evaluate", ("--text", "TEXT"), ""),
        ("generate", ("--prompt", "Hello"), ""),
    ],
)
def test_every_command_says_so(
    command: str, more: tuple[str, ...], way: str, shell: Shell, text: Path, tmp_path: Path
) -> None:
    source = turned(tmp_path / "source")
    second = {"rotate": [tmp_path / "m.onnx"], "quantize": [tmp_path / "m.onnx"], "verify": [source]}.get(command, [])
    assert SAID + way in shell.fails(command, source, *second, *(text if word == "TEXT" else word for word in more))
    assert not (tmp_path / "m.onnx").exists()


def test_the_ways_out(shell: Shell, tmp_path: Path) -> None:
    source = turned(tmp_path / "source")
    shell.ok("rotate", source, tmp_path / "a" / "m.onnx", "--no-verify")
    feeds = {value.name: np.zeros((1, 3, 2, 32), np.float32) for value in model_io.load(source).graph.inputs
             if value.name.startswith("past")}  # fmt: skip
    feeds |= {
        "input_ids": np.array([[5, 6, 7]]),
        "position_ids": np.array([[3, 4, 5]]),
        "attention_mask": np.ones((1, 6)),
    }
    feeds["attention_mask"] = feeds["attention_mask"].astype(np.int64)
    np.savez(tmp_path / "feeds.npz", **feeds)
    given = ("--feeds", tmp_path / "feeds.npz")
    assert shell.ok("rotate", source, tmp_path / "b" / "m.onnx", *given, "--json").json["equivalence"]["passed"]
    shell.ok("verify", source, tmp_path / "b" / "m.onnx", *given)


def test_positions_last(shell: Shell, tmp_path: Path) -> None:
    source = turned(tmp_path / "source", LAST)
    assert "has its positions on axis 3" in shell.fails("rotate", source, tmp_path / "m.onnx")


@pytest.mark.parametrize("case", EXPORTS)
def test_others_are_fed(case: str) -> None:
    inputs = ModelInputs.from_path(EXPORTS[case]())
    assert all(inputs.feed(np.array([[5, 6]]))[past].shape[2] == 0 for past, _ in inputs.presents)
