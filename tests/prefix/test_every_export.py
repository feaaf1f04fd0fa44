"""A float model that holds a prefix computes what the original does that is fed it, however the graph is spelt."""

from pathlib import Path

import numpy as np
import pytest
from batches import left_padded, step
from command_line import Shell
from exports import EXPORTS
from rotating import rotate

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.inputs import InputRole
from quarot_onnx.config import SinkPrefixConfig
from quarot_onnx.evaluation.equivalence import compare
from quarot_onnx.io import model_io
from quarot_onnx.run.prefixing import put_prefix
from quarot_onnx.sessions import runtime

PREFIX = (7, 3)


def prefixed(source: Path, folder: Path, ids: tuple[int, ...] = PREFIX) -> Path:
    model = model_io.load(source)
    put_prefix(model, source, SinkPrefixConfig(form="graph", ids=ids), source.parent)
    target = folder / "prefixed" / "model.onnx"
    model_io.save(model, target, companions_from=source.parent)
    return target


@pytest.mark.parametrize("case", EXPORTS)
def test_the_original_fed_with_the_prefix(case: str, tmp_path: Path) -> None:
    source = EXPORTS[case]()
    target = prefixed(source, tmp_path)
    result = compare(source, target)
    assert result.passed, result
    assert result.decode_steps or not ModelInputs.from_path(source).has_cache
    caches = len(ModelInputs.from_path(source).presents)
    assert len(result.outputs) == 1 + caches
    assert not result.not_compared


@pytest.mark.parametrize("case", ["optimum qwen2", "dynamo llama", "genai packed bias", "opset 23 operators"])
def test_after_rotations(case: str, tmp_path: Path) -> None:
    source = EXPORTS[case]()
    rotated, _, _ = rotate(source, tmp_path)
    assert compare(source, prefixed(rotated, tmp_path)).passed


@pytest.mark.parametrize("case", ["optimum llama", "dynamo eager", "genai", "opset 23 operators"])
def test_another_prefix_is_another_model(case: str, tmp_path: Path) -> None:
    source = EXPORTS[case]()
    target = prefixed(source, tmp_path)
    model = model_io.load(target)
    del model.metadata_props["quarot_onnx.recipe"]
    other = tmp_path / "other" / "model.onnx"
    model_io.save(model, other, companions_from=source.parent)
    assert not compare(source, other).passed


@pytest.mark.parametrize("case", ["optimum llama", "optimum fp16", "optimum gemma3", "dynamo cache", "dynamo cache 23"])
def test_a_batch_padded_on_the_left(case: str, tmp_path: Path) -> None:
    source = EXPORTS[case]()
    target = prefixed(source, tmp_path)
    inputs = ModelInputs.from_path(source)
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, 100, length) for length in (9, 4, 7)]
    padded, alone = runtime.session(target), runtime.session(source)
    logits, past = step(padded, inputs, left_padded(inputs, rows))
    more = rng.integers(5, 100, (3, 1))
    later, _ = step(
        padded, inputs, left_padded(inputs, [np.append(r, m) for r, m in zip(rows, more, strict=True)], past)
    )
    tolerance = 0.02 if "fp16" in case else 1e-4
    for number, row in enumerate(rows):
        whole = np.concatenate([PREFIX, row, more[number]])
        (want,) = alone.run([inputs.logits], inputs.feed(whole[None]))
        got = np.concatenate([logits[number, -len(row) :], later[number]])
        assert np.abs(got - want[0, len(PREFIX) :]).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("case", ["genai", "genai RoPE outside", "genai packed bias"])
def test_rows_of_different_lengths_in_a_fused_attention(case: str, length: int, tmp_path: Path) -> None:
    """GroupQueryAttention takes a mask for a length, and pads on the right."""
    source = EXPORTS[case]()
    ids = tuple(range(11, 11 + length))
    inputs = ModelInputs.from_path(source)
    rng = np.random.default_rng(0)
    rows = [rng.integers(20, 100, size) for size in (9, 4, 7)]
    feeds = inputs.feed(np.stack([np.pad(row, (0, 9 - len(row))) for row in rows]))
    mask = next(name for name, role in inputs.roles.items() if role is InputRole.MASK)
    feeds[mask] = np.stack([np.arange(9) < len(row) for row in rows]).astype(np.int64)
    logits, _ = step(runtime.session(prefixed(source, tmp_path, ids)), inputs, feeds)
    alone = runtime.session(source)
    for number, row in enumerate(rows):
        (want,) = alone.run([inputs.logits], inputs.feed(np.concatenate([ids, row])[None]))
        got = logits[number, : len(row)]
        assert np.abs(got - want[0, length:]).max() <= 1e-4 * np.abs(want).max()


def test_a_buffer_that_past_and_present_share(tmp_path: Path) -> None:
    """onnxruntime-genai gives GroupQueryAttention a past of the longest length, of which the mask says what counts."""
    source = EXPORTS["genai"]()
    target = prefixed(source, tmp_path)
    inputs, room = ModelInputs.from_path(source), 32
    session, alone = runtime.session(target), runtime.session(source)
    ids = np.random.default_rng(0).integers(20, 100, (1, 12))
    mask = next(name for name, role in inputs.roles.items() if role is InputRole.MASK)
    names = [inputs.logits, *(present for _, present in inputs.presents)]
    past = {name: np.zeros((1, *inputs.feed(ids)[name].shape[1:2], room, inputs.feed(ids)[name].shape[3]), np.float32)
            for name, _ in inputs.presents}  # fmt: skip
    found = []
    for start, stop in ((0, 8), (8, 9), (9, 10), (10, 12)):
        feeds = inputs.feed(ids[:, start:stop]) | past
        feeds[mask] = np.ones((1, stop), np.int64)
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        past = inputs.present_to_past(outputs)
        assert {array.shape[2] for array in past.values()} == {room}
        found.append(outputs[inputs.logits])
    (want,) = alone.run([inputs.logits], inputs.feed(np.concatenate([[PREFIX], ids], axis=1)))
    assert np.abs(np.concatenate(found, axis=1) - want[:, len(PREFIX) :]).max() <= 1e-4 * np.abs(want).max()


FUSED = ["dynamo 23", "dynamo cache 23", "opset 23 operators"]


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("more", [(), ("--smooth-alpha", 0.5), ("--by-stages",)], ids=["ranges", "smoothed", "pieces"])
def test_behind_it_fixed_scales_are_calibrated(
    case: str, more: tuple[object, ...], shell: Shell, text: Path, tmp_path: Path
) -> None:
    """opset 23's Attention takes the prefix as a past, which it reads only where its present is asked for."""
    prefix = ("--prefix", "graph", "--prefix-ids", "256,84", "--calib-text", text, "--calib-seq-len", 32)
    small = ("--scheme", "w8a8-static", "--calib-samples", 2, "--no-verify", "--json")
    found = shell.ok("quantize", EXPORTS[case](), tmp_path / "m.onnx", *small, *prefix, *more).json
    assert found["check"]["kl"] < 0.1


@pytest.mark.parametrize("case", FUSED)
def test_sinks_are_looked_for_in_rows_that_the_graph_takes(case: str, shell: Shell, text: Path) -> None:
    """Without positions among its inputs, opset 23's RotaryEmbedding runs one row at a time."""
    text.write_text(4 * text.read_text())
    assert shell.ok("inspect", EXPORTS[case](), "--sinks", "--text", text, "--json").json["sinks"][0]["bits"] < 2
