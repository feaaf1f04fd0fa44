"""GroupQueryAttention with 4 bits and scales of tokens: rows of bytes, as the operator itself would order them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from batches import outputs, step
from exports import EXPORTS, genai_like
from onnx import numpy_helper

from quarot_onnx import KVCacheConfig, QConfig, QuarotConfig, SinkPrefixConfig
from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.inputs import InputRole
from quarot_onnx.calibration.readers import TokenReader
from quarot_onnx.kvcache.integers import ALIKE, UNLIKE, Halves
from quarot_onnx.pipeline import quantize, rotate
from quarot_onnx.sessions import runtime

CASES = [case for case in EXPORTS if case.startswith("genai")]
IDS = np.random.default_rng(0).integers(5, 100, (3, 24))


def rows_of(case: str, folder: Path, *, prefix: bool = False, r3: bool | None = None, **cache: Any) -> Path:
    """An export whose caches are rows of bytes."""
    source, target = EXPORTS[case](), folder / "out" / "model.onnx"
    sink = [SinkPrefixConfig("graph", ids=(7, 3))] if prefix else []
    config = QConfig(None, algo_config=[QuarotConfig(r3=r3), *sink, KVCacheConfig(bits=4, **cache)])
    reader = TokenReader(ModelInputs.from_path(source), IDS)
    quantize(source, target, config, reader, verify=False, check=None)
    return target


def read(rows: np.ndarray, halves: Halves) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The integers [..., 2, n / 2], scales [..., 2, 1] and values [..., n] of rows, by hand."""
    assert rows.dtype == np.uint8
    kept, scales = rows[..., :-4], rows[..., -4:].reshape(*rows.shape[:-1], 2, 2).astype(np.int64)
    numbers = scales[..., 0] + 256 * scales[..., 1]
    sizes = np.exp(numbers % 32768 / 1024 - 16) * np.where(numbers < 32768, 1, -1)
    both = np.stack([kept & ((1 << halves.first) - 1), kept >> halves.first], axis=-2)
    integers = both.astype(np.float64) + halves.lowest[:, None]
    return integers, sizes[..., None], (integers * sizes[..., None]).reshape(*rows.shape[:-1], -1)


def right_padded(inputs: ModelInputs, rows: list[np.ndarray], past: Feeds | None = None) -> Feeds:
    """Rows of different lengths with zeros behind them, told by a mask; on a past the last token of each."""
    longest = max(map(len, rows))
    ids = np.stack([np.pad(row, (0, longest - len(row))) for row in rows])
    feeds = inputs.feed(ids if past is None else np.stack([row[-1:] for row in rows]), past)
    for name, role in inputs.roles.items():
        if role is InputRole.MASK:
            feeds[name] = np.stack([np.arange(longest) < len(row) for row in rows]).astype(feeds[name].dtype)
        elif role is InputRole.POSITIONS and past is not None:
            feeds[name] = np.array([[len(row) - 1] for row in rows], feeds[name].dtype)
    return feeds


def near(got: np.ndarray, want: np.ndarray, case: str) -> bool:
    tolerance = 2e-3 if "fp16" in case else 1e-4
    return bool(np.abs(got - want).max() <= tolerance * np.abs(want).max())


@pytest.mark.parametrize("case", CASES)
def test_rows_are_what_rounding_by_hand_gives(case: str, tmp_path: Path) -> None:
    path = rows_of(case, tmp_path, r3=True, k_clip_ratio=0.9)
    rotate(EXPORTS[case](), tmp_path / "r" / "model.onnx", QuarotConfig(r3=True), verify=False)
    _, exact = outputs(tmp_path / "r" / "model.onnx", IDS[:1])
    _, kept = outputs(path, IDS[:1])
    loose = 1e-2 if "fp16" in case else 1e-3  # a scale is half a 1024th from what it was found as
    for kind, clip in (("key", 0.9), ("value", 1.0)):
        name = f"past_key_values.0.{kind}"  # what comes later sees what was rounded
        x = exact[name].astype(np.float64).reshape(*exact[name].shape[:3], 2, -1)
        integers, scales, values = read(kept[name], ALIKE)
        farthest = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
        assert np.abs(scales / (farthest * clip / -8) - 1).max() < loose
        assert np.abs(integers - np.clip(x / scales, -8, 7)).max() < 0.5 + 8 * loose
        assert np.abs(values).max() > 0


@pytest.mark.parametrize("case", CASES)
def test_balanced_keys_lie_in_five_and_three_bits(case: str, tmp_path: Path) -> None:
    path = rows_of(case, tmp_path)
    exact, _ = outputs(EXPORTS[case](), IDS[:1])
    got, kept = outputs(path, IDS[:1])
    assert np.abs(got - exact).max() < 0.25 * np.abs(exact).max()
    for kind, halves in (("key", UNLIKE), ("value", ALIKE)):
        integers, _, _ = read(kept[f"past_key_values.0.{kind}"], halves)
        for half in (0, 1):
            assert integers[..., half, :].min() == halves.lowest[half]
            assert integers[..., half, :].max() <= -1 - halves.lowest[half]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_batch_padded_on_the_right_and_what_follows(case: str, prefix: bool, tmp_path: Path) -> None:
    """The next token of a shorter row stands where its padding was, and the one after behind it."""
    path = rows_of(case, tmp_path, prefix=prefix)
    inputs, session = ModelInputs.from_path(path), runtime.session(path)
    rows = [IDS[number, :length] for number, length in enumerate((9, 4, 7))]
    logits, past = step(session, inputs, right_padded(inputs, rows))
    got = [[logits[number, : len(row)]] for number, row in enumerate(rows)]
    for at in (20, 21, 22):
        rows = [np.append(row, IDS[number, at]) for number, row in enumerate(rows)]
        logits, past = step(session, inputs, right_padded(inputs, rows, past))
        for number in range(3):
            got[number].append(logits[number])
    for number, row in enumerate(rows):
        want, alone = outputs(path, row[None])
        assert near(np.concatenate(got[number]), want[0], case)
        for name, own in alone.items():
            ours = past[name][number, :, : len(row)].astype(np.int64)
            assert past[name].shape[2] == 12
            assert (np.abs(ours - own[0]) > 0).mean() < 0.02  # the last digits of sums may turn a rounding


@pytest.mark.parametrize("case", CASES)
def test_a_past_that_is_a_buffer_keeps_its_length(case: str, tmp_path: Path) -> None:
    """Of a first prompt it holds nothing yet; later what is behind the tokens is not looked at."""
    path = rows_of(case, tmp_path)
    inputs, session = ModelInputs.from_path(path), runtime.session(path)
    whole, own = outputs(path, IDS[:1])
    buffer = {
        name: np.random.default_rng(1).integers(0, 256, (*array.shape[:2], 40, array.shape[3])).astype(np.uint8)
        for name, array in own.items()
    }
    got = []
    for start, stop in ((0, 10), (10, 14), (14, 15), (15, 24)):
        empty = {name: array[:, :, :start] for name, array in own.items()}
        feeds = inputs.feed(IDS[:1, start:stop], empty, start) | buffer
        logits, buffer = step(session, inputs, feeds)
        got.append(logits)
        assert {array.shape[2] for array in buffer.values()} == {40}
    assert near(np.concatenate(got, axis=1), whole, case)


@pytest.mark.parametrize("factor", [0.0, 1e-12, 1e12])
def test_values_that_have_no_scale_in_the_table(factor: float, tmp_path: Path) -> None:
    """Nothing becomes NaN; what is smaller than all scales is nothing."""
    model, source = onnx.load(genai_like(packed_qkv=False)), tmp_path / "in" / "model.onnx"
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMul" and "v_proj" in node.name:
            tensor = weights[node.input[1]]
            scaled = (numpy_helper.to_array(tensor) * factor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))
    source.parent.mkdir()
    onnx.save(model, source)
    config = QConfig(None, algo_config=[KVCacheConfig(4, 4, k_balance=False)])
    quantize(source, tmp_path / "out" / "model.onnx", config, verify=False, check=None)
    exact, _ = outputs(source, IDS[:1])
    found, kept = outputs(tmp_path / "out" / "model.onnx", IDS[:1], (12,))
    assert np.isfinite(found).all()
    assert kept["past_key_values.0.value"].shape[2] == 24
    if factor < 1:
        assert near(found, exact, "genai")


def test_onnxruntime_genai_is_told_to_let_it_grow(tmp_path: Path) -> None:
    source = tmp_path / "in" / "model.onnx"
    shutil.copytree(genai_like().parent, source.parent)
    (source.parent / "genai_config.json").write_text(
        json.dumps({"model": {"decoder": {"filename": "model.onnx"}}, "search": {"past_present_share_buffer": True}})
    )
    reader = TokenReader(ModelInputs.from_path(source), IDS)
    for bits, shared in ((4, False), (8, True)):
        target = tmp_path / f"{bits}" / "model.onnx"
        quantize(source, target, QConfig(None, algo_config=[KVCacheConfig(bits=bits)]), reader, check=None)
        search = json.loads((target.parent / "genai_config.json").read_text())["search"]
        assert search["past_present_share_buffer"] is shared
