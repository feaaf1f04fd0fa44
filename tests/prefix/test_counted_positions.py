"""Positions that are no input of the graph: a prefix goes before what the graph counts itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from batches import left_padded, step
from command_line import Shell
from exports import EXPORTS
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.config import SinkPrefixConfig
from quarot_onnx.errors import VerificationError
from quarot_onnx.io import model_io
from quarot_onnx.prefix import attach
from quarot_onnx.prefix.pads import Pads
from quarot_onnx.run import turning
from quarot_onnx.run.prefixing import put_prefix
from quarot_onnx.sessions import runtime

NODE = helper.make_node


def counted(folder: Path, kind: str) -> Path:
    """A decoder that counts its positions by a Range of integers or of floats, or of floats added to a length."""
    source = EXPORTS["optimum llama"]()
    shutil.copytree(source.parent, folder)
    model = onnx.load(folder / source.name)
    graph = model.graph
    graph.input.remove(next(value for value in graph.input if value.name == "position_ids"))
    constants = {"first": np.array([0]), "none": np.float32(0), "one": np.float32(1), "half": np.float32(0.5)}
    graph.initializer.extend(numpy_helper.from_array(np.asarray(a), f"c/{name}") for name, a in constants.items())
    graph.initializer.append(numpy_helper.from_array(np.array(1), "c/step"))
    lengths = [
        NODE("Shape", ["past_key_values.0.key"], ["c/held"], start=2, end=3),
        NODE("Squeeze", ["c/held", "c/first"], ["c/past"]),
        NODE("Shape", ["input_ids"], ["c/fed"], start=1, end=2),
        NODE("Squeeze", ["c/fed", "c/first"], ["c/new"]),
        NODE("Cast", ["c/past"], ["c/pastf"], to=TensorProto.FLOAT),
        NODE("Cast", ["c/new"], ["c/newf"], to=TensorProto.FLOAT),
        NODE("Add", ["c/past", "c/new"], ["c/total"]),
        NODE("Add", ["c/pastf", "c/newf"], ["c/totalf"]),
    ]
    counting = {
        "integers": [NODE("Range", ["c/past", "c/total", "c/step"], ["c/counted"])],
        "floats": [NODE("Range", ["c/pastf", "c/totalf", "c/one"], ["c/counted"])],
        "halves": [NODE("Range", ["c/pastf", "c/totalf", "c/half"], ["c/counted"])],
        "added": [
            NODE("Range", ["c/none", "c/newf", "c/one"], ["c/fresh"]),
            NODE("Add", ["c/fresh", "c/pastf"], ["c/counted"]),
        ],
    }[kind]
    before = [*lengths, *counting, NODE("Unsqueeze", ["c/counted", "c/first"], ["position_ids"])]
    for number, node in enumerate(before):
        node.name = f"count_{number}"
    nodes = [*before, *graph.node]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    onnx.save(model, folder / source.name)
    return folder / source.name


@pytest.mark.parametrize("kind", ["integers", "floats"])
def test_a_range_is_shifted(kind: str, shell: Shell, tmp_path: Path) -> None:
    source = counted(tmp_path / "source", kind)
    found = shell.ok("rotate", source, tmp_path / "m.onnx", "--prefix-ids", "7,3", "--json").json
    assert found["equivalence"]["passed"]


SMALL = ("--scheme", "w8a8-static", "--calib-samples", 2, "--calib-seq-len", 32, "--no-check", "--prefix-ids", "7,3")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("halves", "the positions cannot be shifted: count_8 does not count them by ones"),
        ("added", "the positions cannot be shifted: angles are computed with a single number that count_4 casts"),
    ],
)
def test_others_are_refused_by_name(kind: str, reason: str, shell: Shell, text: Path, tmp_path: Path) -> None:
    source = counted(tmp_path / "source", kind)
    common = ("quantize", source, tmp_path / "m.onnx", "--calib-text", text, *SMALL)
    assert reason in shell.fails(*common, "--prefix", "graph")
    if kind == "added":
        assert f"no sink prefix: no prefix fits into this graph: {reason}" in shell.ok(*common, "--prefix", "auto").err


IDS = (7, 3)
PARTED = "pads stand between the prefix and the text of such a row"


def prefixed(source: Path, target: Path, form: str = "graph") -> tuple[Path, tuple[str, ...]]:
    model = model_io.load(source)
    _, plan = put_prefix(model, source, SinkPrefixConfig(form=form, ids=IDS), source.parent)
    model_io.save(model, target, companions_from=source.parent)
    return target, plan.notes


@pytest.mark.parametrize("case", ["dynamo llama", "dynamo 23", "dynamo gpt_neox", "dynamo phi3"])
def test_pads_are_taken_off_without_a_cache(case: str, tmp_path: Path) -> None:
    source = EXPORTS[case]()
    target, notes = prefixed(source, tmp_path / "m.onnx")
    inputs, session, alone = ModelInputs.from_path(source), runtime.session(target), runtime.session(source)
    rows = [np.random.default_rng(0).integers(5, 100, length) for length in (9, 4)]
    feeds = left_padded(inputs, rows)
    logits, _ = step(session, inputs, feeds)
    for number, row in enumerate(rows):
        (want,) = alone.run([inputs.logits], inputs.feed(np.concatenate([IDS, row])[None]))
        assert np.abs(logits[number, -len(row) :] - want[0, 2:]).max() <= 1e-4 * np.abs(want).max()
    assert not any(PARTED in note for note in notes)


@pytest.mark.parametrize("case", ["optimum gemma3", "dynamo llama"])
def test_without_pads_nothing_changes(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = EXPORTS[case]()
    inputs, ids = ModelInputs.from_path(source), np.random.default_rng(0).integers(5, 100, (2, 9))
    found, _ = prefixed(source, tmp_path / "a" / "m.onnx")
    monkeypatch.setattr(attach, "find_pads", lambda *_: Pads())
    plain, _ = prefixed(source, tmp_path / "b" / "m.onnx")
    assert any(node.op_type == "ArgMax" for node in model_io.load(found).graph)
    assert not any(node.op_type == "ArgMax" for node in model_io.load(plain).graph)
    a, b = (step(runtime.session(path), inputs, inputs.feed(ids)) for path in (found, plain))
    np.testing.assert_array_equal(a[0], b[0])
    for name, array in a[1].items():
        np.testing.assert_array_equal(array, b[1][name])


def test_where_they_stay_a_note_says_so(tmp_path: Path) -> None:
    """Floats are left alone, and so is what the caller is given as a cache."""
    floats, gemma, llama = counted(tmp_path / "s", "floats"), EXPORTS["optimum gemma3"](), EXPORTS["optimum llama"]()
    cases = [(floats, "graph", True), (gemma, "npz", True), (gemma, "graph", False), (llama, "npz", False)]
    for number, (source, form, parted) in enumerate(cases):
        _, notes = prefixed(source, tmp_path / str(number) / "m.onnx", form)
        assert any(PARTED in note for note in notes) is parted, (source, form)


WINDOW = "config.json states a sliding window of 64 tokens, which the prefix in the graph never leaves"


def test_a_sliding_window_is_named(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, given = EXPORTS["optimum gemma3"](), ("--prefix-ids", "7,3")
    gemma = shutil.copytree(whole.parent, tmp_path / "gemma") / whole.name
    config = json.loads((gemma.parent / "config.json").read_text())
    config["layer_types"] = ["sliding_attention", "full_attention"]
    (gemma.parent / "config.json").write_text(json.dumps(config))
    assert "window" not in shell.ok("rotate", whole, tmp_path / "d" / "m.onnx", *given).err
    assert WINDOW in shell.ok("rotate", gemma, tmp_path / "a" / "m.onnx", *given).err
    assert "window" not in shell.ok("rotate", EXPORTS["optimum llama"](), tmp_path / "b" / "m.onnx", *given).err

    def differ(_: object) -> None:
        raise VerificationError("the models differ")

    monkeypatch.setattr(turning, "require", differ)
    assert WINDOW in shell.fails("rotate", gemma, tmp_path / "c" / "m.onnx", *given, status=1)
    assert "window" not in shell.fails("rotate", gemma, tmp_path / "c" / "m.onnx", status=1)
