"""A quantized cache in every export: what rounding by hand gives, prefilled or decoded, alone or in a batch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from batches import left_padded, outputs, step
from exports import EXPORTS, optimum_export
from onnx import numpy_helper

from quarot_onnx import KVCacheConfig, QConfig, QuarotConfig, SinkPrefixConfig
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.inputs import InputRole
from quarot_onnx.calibration.readers import TokenReader
from quarot_onnx.config.kv_cache import CacheGrid
from quarot_onnx.graph.metadata import recorded
from quarot_onnx.io import model_io
from quarot_onnx.kvcache.fused import FusedCache
from quarot_onnx.kvcache.integers import ALIKE, UNLIKE, Halves, stored
from quarot_onnx.kvcache.joined import JoinedCache
from quarot_onnx.kvcache.places import find_cache_places
from quarot_onnx.pipeline import quantize, rotate
from quarot_onnx.quantization.activations import fake_quantize
from quarot_onnx.sessions import runtime
from quarot_onnx.sites.detect import Survey

CACHED = [case for case in EXPORTS if case.startswith(("optimum", "dynamo cache", "genai"))]
SPELT = [case for case in CACHED if not case.startswith("genai")]
FUSED = [case for case in CACHED if case.startswith("genai")]
QUARTER = "gpt_neox, a quarter of a head"
IDS = np.random.default_rng(0).integers(5, 100, (3, 24))


def cached(
    case: str, folder: Path, *, rotates: bool = True, r3: bool | None = None, prefix: bool = False, **cache: Any
) -> Path:
    """An export with a quantized cache, and nothing else quantized."""
    source = optimum_export("gpt_neox", rotary_pct=0.25) if case == QUARTER else EXPORTS[case]()
    target = folder / "out" / "model.onnx"
    rotation = [QuarotConfig(r3=r3)] if rotates else []
    sink = [SinkPrefixConfig("graph", ids=(7, 3))] if prefix else []
    config = QConfig(None, algo_config=[*rotation, *sink, KVCacheConfig(**cache)])
    reader = TokenReader(ModelInputs.from_path(source), IDS)
    quantize(source, target, config, reader, verify=False, check=None)
    return target


def near(got: np.ndarray, want: np.ndarray, tolerance: float) -> bool:
    return bool(np.abs(got - want).max() <= tolerance * np.abs(want).max())


@pytest.mark.parametrize("case", SPELT)
def test_integers_are_the_values_that_the_fake_form_rounds_to(case: str, tmp_path: Path) -> None:
    integers, _ = outputs(cached(case, tmp_path / "int", bits=8), IDS[:1])
    fake, _ = outputs(cached(case, tmp_path / "fake", bits=8, form="fake"), IDS[:1])
    assert near(integers, fake, 2e-3 if "fp16" in case else 1e-5)
    exact, _ = outputs(EXPORTS[case](), IDS[:1])
    assert not near(integers, exact, 1e-5)


def halved(x: np.ndarray) -> np.ndarray:
    """[..., n] as [..., 2, n / 2]."""
    return x.reshape(*x.shape[:-1], 2, -1)


def unpacked(kept: np.ndarray, halves: Halves) -> np.ndarray:
    """The integers of bytes, [..., 2, n / 2]."""
    both = np.stack([kept & ((1 << halves.first) - 1), kept >> halves.first], axis=-2)
    return np.asarray(both.astype(np.float32) + halves.lowest[:, None])


@pytest.mark.parametrize("halves", [ALIKE, UNLIKE], ids=str)
@pytest.mark.parametrize("case", SPELT)
def test_of_four_bits_the_farthest_entry_of_a_half_is_the_lowest_integer(
    case: str, halves: Halves, tmp_path: Path
) -> None:
    source = optimum_export("gpt_neox", rotary_pct=0.25) if case == QUARTER else EXPORTS[case]()
    _, exact = outputs(source, IDS[:1])
    model = model_io.load(source)
    for place in find_cache_places(Survey(model)).joined:
        JoinedCache(model).write(place, CacheGrid(4, None, symmetric=True, clip_ratio=1.0), None, halves)
    model_io.save(model, tmp_path / "model.onnx")
    _, kept = outputs(tmp_path / "model.onnx", IDS[:1])
    first = next(iter(exact))  # what comes later sees what was rounded
    loose = 1e-2 if "fp16" in case else 3e-3  # scales are float16
    for name in (first, f"{first.removesuffix('key')}value"):
        x, scales = halved(exact[name].astype(np.float32)), kept[f"{name}_scale"]
        assert scales.dtype == np.float16
        integers, steps = unpacked(kept[name], halves), x / scales[..., None].astype(np.float32)
        farthest = np.take_along_axis(integers, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
        assert np.array_equal(farthest, np.broadcast_to(halves.lowest[:, None], farthest.shape))
        top = -1 - halves.lowest[:, None]
        assert (np.abs(steps).max(axis=(0, 1, 2, 4)) < (top[:, 0] + 1) * (1 + loose)).all()
        assert np.abs(integers - np.minimum(steps, top)).max() < 0.5 + 16 * loose


@pytest.mark.parametrize("case", ["optimum llama", "optimum fp16", "dynamo cache"])
def test_balanced_keys_lie_in_five_and_three_bits(case: str, tmp_path: Path) -> None:
    """The record tells them from values, which are alike."""
    path = cached(case, tmp_path, bits=4)
    _, kept = outputs(path, IDS[:1])
    exact, _ = outputs(EXPORTS[case](), IDS[:1])
    got, _ = outputs(path, IDS[:1])
    assert near(got, exact, 0.25)
    first = next(name for name in kept if name.endswith("key"))
    for name, halves in ((first, UNLIKE), (f"{first.removesuffix('key')}value", ALIKE)):
        integers = unpacked(kept[name], halves)
        reached = [sorted(set(part.ravel())) for part in (integers[..., 0, :], integers[..., 1, :])]
        assert [part[0] for part in reached] == list(halves.lowest)
        assert all((integers == halves.lowest[:, None]).any(axis=-1).ravel())


def test_scales_that_float16_cannot_hold_stay_finite(tmp_path: Path) -> None:
    """Keys of millions: what is beyond the largest scale is cut off."""
    model = onnx.load(EXPORTS["optimum llama"]())
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMul" and "v_proj" in node.name:
            tensor = weights[node.input[1]]
            tensor.CopyFrom(numpy_helper.from_array(1e8 * numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, tmp_path / "large.onnx")
    config = QConfig(None, algo_config=[KVCacheConfig(v_bits=4)])
    quantize(tmp_path / "large.onnx", tmp_path / "out" / "model.onnx", config, verify=False, check=None)
    found, kept = outputs(tmp_path / "out" / "model.onnx", IDS[:1], (12,))
    assert np.isfinite(found).all()
    assert all(np.isfinite(array.astype(np.float32)).all() for array in kept.values())


def test_a_token_whose_key_is_zero(tmp_path: Path) -> None:
    """Its scale is none, and nothing is divided by it."""
    model = onnx.load(EXPORTS["optimum llama"]())
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in products:
        if "k_proj" in node.name or "v_proj" in node.name:
            tensor = weights[node.input[1]]
            tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), tensor.name))
    onnx.save(model, tmp_path / "zero.onnx")
    config = QConfig(None, algo_config=[KVCacheConfig(4, 4)])
    quantize(tmp_path / "zero.onnx", tmp_path / "out" / "model.onnx", config, verify=False, check=None)
    exact, _ = outputs(tmp_path / "zero.onnx", IDS[:1])
    found, _ = outputs(tmp_path / "out" / "model.onnx", IDS[:1], (12,))
    assert near(found, exact, 1e-5)


@pytest.mark.parametrize("scales", ["channel", "head", "tensor"])
@pytest.mark.parametrize("case", ["optimum llama", "optimum fp16", "dynamo cache", "dynamo cache 23"])
def test_fixed_scales_are_taken_too(case: str, scales: str, tmp_path: Path) -> None:
    path = cached(case, tmp_path / scales, bits=8, scales=scales)
    exact, _ = outputs(EXPORTS[case](), IDS[:1])
    got, past = outputs(path, IDS[:1])
    assert {array.dtype for array in past.values()} == {np.dtype(np.int8)}
    assert len(past) == len(ModelInputs.from_path(EXPORTS[case]()).presents)
    assert near(got, exact, 0.1)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("case", FUSED)
def test_a_fused_operator_keeps_what_rounding_by_hand_gives(case: str, bits: int, tmp_path: Path) -> None:
    source = EXPORTS[case]()
    path = cached(case, tmp_path, bits=bits, scales="channel", k_clip_ratio=0.95, v_clip_ratio=0.95, k_balance=False)
    rotate(source, tmp_path / "r" / "model.onnx", QuarotConfig(r3=True), verify=False)
    _, exact = outputs(tmp_path / "r" / "model.onnx", IDS[:1])
    _, kept = outputs(path, IDS[:1])
    _, whole = outputs(tmp_path / "r" / "model.onnx", IDS)
    model = model_io.load(path)
    operators = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    for operator in operators[:1]:  # what comes later sees what was rounded
        for index, scale in ((3, 12), (4, 13)):
            name = operator.inputs[index].name
            scales = operator.inputs[scale].const_value.numpy()
            want = stored(exact[name].astype(np.float32), scales, bits)
            assert kept[name].dtype == (np.int8 if bits == 8 else np.uint8)
            assert kept[name].shape == want.shape
            assert (kept[name] == want).mean() > 0.99  # a float product may fall to the other side of a half
            top = np.abs(whole[name].astype(np.float32)).max(axis=(0, 2), keepdims=True) * 0.95 / (2 ** (bits - 1) - 1)
            assert near(scales, top, 2e-3 if "fp16" in case else 1e-4)


def test_scales_of_two_kinds_are_written_as_one(tmp_path: Path) -> None:
    """onnxruntime takes K and V per tensor or both per channel; of one KV head the scale of a head is a single one."""
    model = model_io.load(EXPORTS["genai"]())
    (place, *others) = find_cache_places(Survey(model)).fused
    heads, head_dim = place.attention.num_kv_heads, place.attention.head_dim
    channels = np.full((1, heads, 1, head_dim), 0.05, np.float32)
    cache = FusedCache(model)
    cache.write(place, 8, np.full((1, 1, 1, 1), 0.05, np.float32), channels)
    for other in others:
        cache.write(other, 8, channels, channels)
    model_io.save(model, tmp_path / "mixed.onnx")
    for other in others:
        assert other.node.attributes["k_quant_type"].as_string() == "PER_CHANNEL"
    mixed, _ = outputs(tmp_path / "mixed.onnx", IDS[:1])
    same = model_io.load(EXPORTS["genai"]())
    cache = FusedCache(same)
    for place in find_cache_places(Survey(same)).fused:
        cache.write(place, 8, channels, channels)
    model_io.save(same, tmp_path / "same.onnx")
    assert np.array_equal(mixed, outputs(tmp_path / "same.onnx", IDS[:1])[0])


FIXED = [(case, 4, "channel") for case in FUSED]


@pytest.mark.parametrize(
    ("case", "bits", "scales"),
    [*((case, 4, "auto") for case in CACHED), ("optimum llama", 8, "auto"), ("genai", 8, "auto"), *FIXED],
)
def test_decoding_computes_what_the_prefill_does(case: str, bits: int, scales: str, tmp_path: Path) -> None:
    path = cached(case, tmp_path, bits=bits, scales=scales)
    whole, _ = outputs(path, IDS[:1])
    decoded, past = outputs(path, IDS[:1], tuple(range(12, 24)))
    assert near(decoded, whole, 2e-3 if "fp16" in case else 1e-4)
    assert {array.dtype.kind for array in past.values()} <= {"i", "u", "f"}
    assert any(array.dtype == (np.int8 if bits == 8 else np.uint8) for array in past.values())


@pytest.mark.parametrize(
    ("case", "bits"), [("optimum llama", 8), ("optimum fp16", 4), ("dynamo cache", 4), ("dynamo cache 23", 8)]
)
def test_a_batch_padded_on_the_left(case: str, bits: int, tmp_path: Path) -> None:
    path = cached(case, tmp_path, bits=bits)
    inputs, session = ModelInputs.from_path(path), runtime.session(path)
    rows = [IDS[number, :length] for number, length in enumerate((9, 4, 7))]
    more = IDS[:, 20:21]
    logits, past = step(session, inputs, left_padded(inputs, rows))
    longer = [np.append(row, next_) for row, next_ in zip(rows, more, strict=True)]
    later, _ = step(session, inputs, left_padded(inputs, longer, past))
    for number, row in enumerate(longer):
        want, _ = outputs(path, row[None], (len(row) - 1,))
        got = np.concatenate([logits[number, -len(row) + 1 :], later[number]])
        assert near(got, want[0], 2e-3 if "fp16" in case else 1e-4)


@pytest.mark.parametrize(
    ("case", "bits"), [("genai", 8), ("genai packed bias", 4), ("genai RoPE outside", 4), ("genai fp16", 8)]
)
def test_a_batch_padded_on_the_right(case: str, bits: int, tmp_path: Path) -> None:
    """GroupQueryAttention takes a mask for a length."""
    path = cached(case, tmp_path, bits=bits, scales="channel")
    inputs = ModelInputs.from_path(path)
    rows = [IDS[number, :length] for number, length in enumerate((9, 4, 7))]
    feeds = inputs.feed(np.stack([np.pad(row, (0, 9 - len(row))) for row in rows]))
    mask = next(name for name, role in inputs.roles.items() if role is InputRole.MASK)
    feeds[mask] = np.stack([np.arange(9) < len(row) for row in rows]).astype(np.int64)
    logits, _ = step(runtime.session(path), inputs, feeds)
    for number, row in enumerate(rows):
        want, _ = outputs(path, row[None])
        assert near(logits[number, : len(row)], want[0], 2e-3 if "fp16" in case else 1e-4)


@pytest.mark.parametrize(
    ("case", "bits", "scales"),
    [
        ("optimum llama", 4, "auto"),
        ("dynamo cache", 8, "auto"),
        ("genai", 4, "auto"),
        ("genai RoPE outside", 4, "auto"),
        ("genai packed bias", 8, "auto"),
        ("genai fp16", 4, "auto"),
        ("genai", 4, "channel"),
    ],
)
def test_behind_a_prefix_in_the_graph(case: str, bits: int, scales: str, tmp_path: Path) -> None:
    path = cached(case, tmp_path, prefix=True, bits=bits, scales=scales)
    whole, past = outputs(path, IDS[:1])
    decoded, _ = outputs(path, IDS[:1], tuple(range(16, 24)))
    loose = 2e-3 if "fp16" in case else 1e-4
    assert near(decoded, whole, loose)
    assert {array.shape[2] for array in past.values()} == {24}
    exact, _ = outputs(EXPORTS[case](), np.concatenate([[[7, 3]], IDS[:1]], axis=1))
    assert near(whole, exact[:, 2:], 0.15 if bits == 8 else 1.0)
    assert not near(whole, exact[:, 2:], loose)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rotates", "r3"), [(False, None), (True, False)])
def test_behind_a_prefix_where_rope_stays_inside(rotates: bool, r3: bool | None, bits: int, tmp_path: Path) -> None:
    """Q, K and V are one value there, which the prefix stands before."""
    path = cached("genai", tmp_path, rotates=rotates, r3=r3, prefix=True, bits=bits, k_balance=False)
    whole, _ = outputs(path, IDS[:1])
    decoded, _ = outputs(path, IDS[:1], tuple(range(16, 24)))
    assert near(decoded, whole, 1e-4)
    exact, _ = outputs(EXPORTS["genai"](), np.concatenate([[[7, 3]], IDS[:1]], axis=1))
    assert near(whole, exact[:, 2:], 0.15 if bits == 8 else 1.0)


@pytest.mark.parametrize(
    ("rotates", "r3", "cache"),
    [
        (True, True, {"k_bits": 2, "v_bits": 2}),
        (True, False, {"k_bits": 2, "v_bits": None}),
        (False, None, {"k_bits": None, "v_bits": 2}),
        (False, None, {"k_bits": 2, "v_bits": 2, "k_groupsize": -1, "v_groupsize": 8, "v_asym": True}),
        (False, None, {"k_bits": 2, "v_bits": 2, "k_pre_rope": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["genai", "genai RoPE outside", "genai q, k, v bias", "genai fp16", "optimum llama"])
def test_a_prefix_is_not_rounded_in_studies(
    case: str, rotates: bool, r3: bool | None, cache: dict[str, Any], tmp_path: Path
) -> None:
    """It is fed as new tokens to a first prompt of GroupQueryAttention, and stands in the past later on."""
    path = cached(case, tmp_path, rotates=rotates, r3=r3, prefix=True, form="fake", **cache)
    whole, _ = outputs(path, IDS)
    decoded, _ = outputs(path, IDS, tuple(range(1, 24)))
    assert near(decoded, whole, 2e-2 if "fp16" in case else 1e-4)


GRIDS = [
    {"k_bits": 4, "v_bits": 2, "k_asym": True},
    {"k_bits": 4, "v_bits": 3, "k_groupsize": 8, "v_groupsize": 4, "v_asym": True},
    {"k_bits": 5, "v_bits": 6, "k_groupsize": -1, "v_groupsize": -1, "k_asym": True, "v_clip_ratio": 0.9},
    {"k_bits": 8, "v_bits": 4, "form": "fake", "k_clip_ratio": 0.95},
]


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("case", ["optimum llama", "genai", "genai fp16"])
def test_the_fake_form_rounds_as_by_hand(case: str, grids: dict[str, Any], tmp_path: Path) -> None:
    source = EXPORTS[case]()
    rotate(source, tmp_path / "r" / "model.onnx", QuarotConfig(r3=True), verify=False)
    _, exact = outputs(tmp_path / "r" / "model.onnx", IDS[:1])
    _, kept = outputs(cached(case, tmp_path, **grids), IDS[:1])
    first = next(iter(exact))  # what comes later sees what was rounded
    for what, name in (("k", first), ("v", f"{first.removesuffix('key')}value")):
        array = exact[name]
        batch, heads, length, width = array.shape
        group = grids.get(f"{what}_groupsize")
        rows = array.astype(np.float32)
        if group == -1:
            rows = rows.swapaxes(1, 2).reshape(batch, length, heads * width)
        want = fake_quantize(
            rows,
            grids[f"{what}_bits"],
            symmetric=not grids.get(f"{what}_asym", False),
            group_size=None if group == -1 else group,
            clip_ratio=grids.get(f"{what}_clip_ratio", 1.0),
        )
        if group == -1:
            want = want.reshape(batch, length, heads, width).swapaxes(1, 2)
        close = np.abs(kept[name].astype(np.float32) - want) <= 2e-3 * np.abs(want).max()
        assert close.mean() > 0.99, name  # a float product may fall to the other side of a half


@pytest.mark.parametrize(
    "case", ["optimum llama", "optimum qwen2", "optimum gpt_neox", QUARTER, "dynamo cache", "genai"]
)
@pytest.mark.parametrize("group", [None, -1])
def test_keys_are_rounded_before_rope(case: str, group: int | None, tmp_path: Path) -> None:
    """RoPE keeps the length of every pair: keys of one token, rounded before it, have the same ones everywhere."""
    lengths = {}
    for pre_rope in (True, False):
        path = cached(case, tmp_path / str(pre_rope), rotates=False, k_bits=3, k_pre_rope=pre_rope, k_groupsize=group)
        _, kept = outputs(path, np.full((1, 12), 7))
        keys = next(iter(kept.values())).astype(np.float64)
        turned = keys.shape[-1] // (4 if "quarter" in case else 1)
        pairs = np.hypot(keys[..., : turned // 2], keys[..., turned // 2 : turned])
        lengths[pre_rope] = np.abs(pairs - pairs[:, :, :1]).max() / pairs.max()
    assert lengths[True] < 1e-5
    assert lengths[False] > 0.05


@pytest.mark.parametrize(("k_bits", "v_bits"), [(8, None), (None, 4), (4, 8)])
def test_keys_or_values_alone(k_bits: int | None, v_bits: int | None, tmp_path: Path) -> None:
    path = cached("optimum llama", tmp_path, k_bits=k_bits, v_bits=v_bits)
    _, past = outputs(path, IDS[:1], (20,))
    kinds = {8: np.int8, 4: np.uint8, None: np.float32}
    for name, array in past.items():
        if name.endswith(".key"):
            assert array.dtype == kinds[k_bits]
        elif name.endswith(".value"):
            assert array.dtype == kinds[v_bits]


@pytest.mark.parametrize("case", ["optimum llama", "genai"])
def test_r3_comes_in_where_keys_are_quantized(case: str, tmp_path: Path) -> None:
    def rotated(path: Path) -> bool:
        recipe = recorded(model_io.load(path))
        assert recipe is not None
        return "R3" in json.dumps(recipe["rotation"]["counts"])  # type: ignore[index]

    assert rotated(cached(case, tmp_path / "k", bits=8))
    assert not rotated(cached(case, tmp_path / "n", bits=8, r3=False))
    assert not rotated(cached(case, tmp_path / "p", k_bits=3, k_pre_rope=True))
    if case == "optimum llama":
        assert not rotated(cached(case, tmp_path / "v", v_bits=8))


@pytest.mark.parametrize(("bits", "least"), [(8, 3.5), (4, 6.5)])
@pytest.mark.parametrize("case", ["optimum llama", "genai"])
def test_what_a_caller_holds_is_smaller(case: str, bits: int, least: float, tmp_path: Path) -> None:
    _, before = outputs(EXPORTS[case](), IDS[:1])
    _, after = outputs(cached(case, tmp_path, bits=bits), IDS[:1])
    sizes = [sum(array.nbytes for array in past.values()) for past in (before, after)]
    head_dim = next(iter(before.values())).shape[-1]
    if case == "optimum llama" or bits == 4:  # the scale of a head weighs more than with the usual 64 and 128 entries
        least = 4 * head_dim / (head_dim * bits / 8 + 4)
    assert sizes[0] >= least * sizes[1]
