"""Balanced keys: the least error that a matrix can have, the same model in float, and when they come in."""

import shutil
from pathlib import Path
from typing import Any

import cached_decoder
import learned_positions
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from batches import outputs
from exports import EXPORTS

from quarot_onnx import KVCacheConfig, QConfig, QuarotConfig, SinkPrefixConfig
from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.readers import SampleReader, TokenReader
from quarot_onnx.errors import CalibrationError, ConfigError, ModelError
from quarot_onnx.evaluation.equivalence import compare, require
from quarot_onnx.graph.metadata import recorded
from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.io import model_io
from quarot_onnx.io.lengths import fix_lengths
from quarot_onnx.kvcache.balance import _mixing, balanced
from quarot_onnx.kvcache.integers import ALIKE, UNLIKE, Halves
from quarot_onnx.kvcache.moments import _Sums, attended, balanceable, collect_moments
from quarot_onnx.kvcache.shifting import Shifts
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.pipeline import quantize, rotate
from quarot_onnx.quantization.activations import fake_quantize
from quarot_onnx.run.balancing import balance_in_place
from quarot_onnx.run.provenance import make_recipe, record
from quarot_onnx.sites.detect import Survey
from quarot_onnx.sites.model import Attention

CACHED = [case for case in EXPORTS if case.startswith(("optimum", "dynamo cache", "genai"))]
IDS = np.random.default_rng(0).integers(5, 100, (3, 24))
SIZE = 16


def moments(seed: int) -> np.ndarray:
    """Of some directions a hundred times more than of others."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((200, SIZE)) * np.geomspace(0.1, 10, SIZE) @ np.linalg.qr(rng.random((SIZE, SIZE)))[0]
    return np.asarray(rows.T @ rows / len(rows))


def test_the_error_of_scores_is_the_least_there_can_be() -> None:
    keys, queries, mixing = moments(1), moments(2), Rotation.hadamard(SIZE)
    for_queries, for_keys = balanced(keys, queries, mixing)
    np.testing.assert_allclose(for_queries @ for_keys.T, np.eye(SIZE), atol=1e-9)
    after = for_keys.T @ keys @ for_keys, for_queries.T @ queries @ for_queries
    product = np.trace(after[0]) * np.trace(after[1])
    least = np.sqrt(np.linalg.eigvals(keys @ queries).real).sum() ** 2
    assert least <= product < 1.02 * least  # the ridge
    assert product < 0.5 * np.trace(keys) * np.trace(queries)
    for found in after:  # no entry is larger than others
        np.testing.assert_allclose(np.diag(found), np.trace(found) / SIZE, rtol=2e-2)  # the ridge, too


def test_rounded_keys_are_nearer_than_behind_a_hadamard() -> None:
    rng, mixing = np.random.default_rng(3), Rotation.hadamard(SIZE)
    keys, queries = (rng.multivariate_normal(np.zeros(SIZE), moments(seed), 400) for seed in (1, 2))
    scores = queries @ keys.T
    errors = []
    for b, a in (balanced(moments(1), moments(2), mixing), (mixing.matrix(), mixing.matrix())):
        rounded = fake_quantize((keys @ a).astype(np.float32), 4, symmetric=True)
        errors.append(np.square(queries @ b @ rounded.T - scores).mean())
    assert errors[0] < 0.6 * errors[1]


def in_halves(x: np.ndarray, halves: Halves) -> np.ndarray:
    """Rows rounded, each half on a grid of its own, its farthest entry the lowest integer."""
    parts = np.split(x, 2, axis=1)
    for part, lowest in zip(parts, halves.lowest, strict=True):
        farthest = np.take_along_axis(part, np.abs(part).argmax(axis=1, keepdims=True), axis=1)
        part[...] = np.clip(np.rint(part / farthest * lowest), lowest, -1 - lowest) * farthest / lowest
    return np.concatenate(parts, axis=1)


def test_what_queries_see_most_lies_in_the_first_half_and_gains_from_a_fifth_bit() -> None:
    rng = np.random.default_rng(3)
    keys, queries = (rng.multivariate_normal(np.zeros(SIZE), moments(seed), 400) for seed in (1, 2))
    b, a = balanced(moments(1), moments(2), _mixing(SIZE, None, halved=True))
    np.testing.assert_allclose(b @ a.T, np.eye(SIZE), atol=1e-9)
    within = np.diag(a.T @ moments(1) @ a).reshape(2, -1)
    np.testing.assert_allclose(within, within.mean(axis=1, keepdims=True).repeat(SIZE // 2, axis=1), rtol=2e-2)
    assert within[0, 0] > 4 * within[1, 0]
    scores, whole = queries @ keys.T, balanced(moments(1), moments(2), _mixing(SIZE, None, halved=False))
    errors = [
        np.square(queries @ left @ in_halves(keys @ right, halves).T - scores).mean()
        for (left, right), halves in (((b, a), UNLIKE), ((b, a), ALIKE), (whole, ALIKE))
    ]
    assert errors[0] < 0.7 * min(errors[1:]), errors


@pytest.mark.parametrize("empty", [0, 1])
def test_heads_that_hold_nothing(empty: int) -> None:
    given = [np.zeros((SIZE, SIZE)) if number == empty else moments(1) for number in range(2)]
    for_queries, for_keys = balanced(*given, Rotation.hadamard(SIZE))
    np.testing.assert_allclose(for_queries @ for_keys.T, np.eye(SIZE), atol=1e-9)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over keys so far."""
    scores = np.where(np.tri(len(scores)) > 0, scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def test_weights_are_derivatives_of_the_softmax() -> None:
    """By differences, key by key, of four query heads on two KV heads."""
    rng = np.random.default_rng(4)
    queries, keys = (rng.standard_normal((heads, 6, SIZE)) for heads in (4, 2))
    found = attended(queries.astype(np.float32), keys.astype(np.float32))
    want = np.zeros((2, 6))
    for head in range(4):
        scores = queries[head] @ keys[head // 2].T / np.sqrt(SIZE)
        for key in range(6):
            ends = [softmax(scores + step * np.eye(6)[key])[:, key] for step in (1e-6, -1e-6)]
            want[head // 2, key] += ((ends[0] - ends[1]) / 2e-6).sum()
    np.testing.assert_allclose(found, want, rtol=1e-4)


def test_long_texts_are_weighted_by_some_of_their_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    queries, keys = (rng.standard_normal((2, 400, SIZE)).astype(np.float32) for _ in range(2))
    whole = attended(queries, keys)
    monkeypatch.setattr("quarot_onnx.kvcache.moments._QUERIES", 100)
    some = attended(queries, keys)
    assert np.corrcoef(whole[0], some[0])[0, 1] > 0.9


def sums_of(queries: np.ndarray, keys: np.ndarray) -> _Sums:
    """One head's, in one run, the keys before the queries."""
    attention = Attention(ir.node("Softmax", []), 1, 1, SIZE, None, 0, None, None)
    sums = _Sums(attention)
    assert sums.of_keys.add(keys[None, None].astype(np.float32))
    assert sums.of_queries.add(queries[None, None].astype(np.float32))
    return sums


def test_a_sink_and_the_mean_of_keys_are_rounded_finely() -> None:
    """Keys far from 0 but for the one that most attention goes to: what attention gives is nearer than without."""
    rng, mixing = np.random.default_rng(6), Rotation.hadamard(SIZE)
    mean = 6 * rng.standard_normal(SIZE)
    keys = mean + rng.standard_normal((64, SIZE))
    keys[0] = 0.1 * rng.standard_normal(SIZE)
    queries = rng.standard_normal((64, SIZE))
    queries -= np.outer(queries @ mean + 16, mean) / (mean @ mean)  # scores of all but the first are lower by 4
    values = rng.standard_normal((64, SIZE))
    exact = softmax(queries @ keys.T / np.sqrt(SIZE))
    assert 0.3 < exact[8:, 0].mean() < 0.99
    errors = []
    for centred in (True, False):
        moments = sums_of(queries, keys).moments(centred=centred)
        centre = 0 if moments.centres is None else moments.centres[0]
        b, a = balanced(moments.keys[0], moments.queries[0], mixing)
        rounded = fake_quantize(((keys - centre) @ a).astype(np.float32), 4, symmetric=True)
        found = softmax(queries @ b @ rounded.T / np.sqrt(SIZE))
        errors.append(np.square((found - exact) @ values).mean())
    assert errors[0] < 0.75 * errors[1], errors


def balance(source: Path, target: Path, reader: Any = None) -> Path:
    """The export with balanced keys, in float."""
    model = model_io.load(source)
    data = reader or TokenReader(ModelInputs.from_path(source), IDS)
    plan = balance_in_place(source, Survey(model), data, source.parent)
    record(model, make_recipe(transform=(plan, KVCacheConfig(4))))
    model_io.save(model, target)
    return target


@pytest.mark.parametrize("case", CACHED)
def test_the_float_model_computes_the_same(case: str, tmp_path: Path) -> None:
    source = EXPORTS[case]()
    path = balance(source, tmp_path / "model.onnx")
    require(compare(source, path))
    exact, caches = outputs(source, IDS[:1])
    found, changed = outputs(path, IDS[:1], (12, 13))
    loose = (2e-2 if "fp16" in case else 1e-4) * np.abs(exact).max()
    np.testing.assert_allclose(found, exact, atol=loose)
    keys = [name for name in caches if not np.allclose(caches[name], changed[name], rtol=1e-2, atol=1e-2)]
    assert len(keys) == len(caches) // 2
    assert all("key" in name for name in keys)


def test_capped_scores_are_balanced_without_a_centre(tmp_path: Path) -> None:
    """A cap sees what all scores have in common."""
    source = tmp_path / "capped.onnx"
    proto = onnx.load(EXPORTS["genai"]())
    for node in proto.graph.node:
        if node.op_type == "GroupQueryAttention":
            next(attribute for attribute in node.attribute if attribute.name == "softcap").f = 0.5
    onnx.save(proto, source)
    attentions, _ = balanceable(Survey(model_io.load(source)))
    found = collect_moments(source, attentions, TokenReader(ModelInputs.from_path(source), IDS), positions=1)
    assert [moments.centres for moments in found.values()] == [None, None]
    path = balance(source, tmp_path / "model.onnx")
    require(compare(source, path))
    exact, _ = outputs(source, IDS[:1])
    np.testing.assert_allclose(outputs(path, IDS[:1], (12,))[0], exact, atol=1e-4 * np.abs(exact).max())


@pytest.mark.parametrize("fixed", [False, True], ids=["free", "fixed"])
def test_padding_has_no_part_in_it(fixed: bool, tmp_path: Path) -> None:
    """Of a batch that the graph fixes neither, where rows are chosen from what was run."""
    source = EXPORTS["optimum llama"]()
    inputs = ModelInputs.from_path(source)
    rows = [IDS[0, :9], IDS[1, :5]]
    alone = [inputs.feed(row[None]) for row in rows]
    padded = inputs.feed(np.stack([rows[0], np.pad(rows[1], (4, 0))]))
    mask, positions = (next(name for name in padded if part in name) for part in ("mask", "position"))
    padded[mask][1, :4] = 0
    padded[positions][1] = np.maximum(np.arange(9) - 4, 0)
    attentions, _ = balanceable(Survey(model_io.load(source)))
    want = collect_moments(source, attentions, SampleReader(alone), positions=1)
    if fixed:
        shutil.copytree(source.parent, tmp_path / "fixed")
        source = tmp_path / "fixed" / source.name
        fix_lengths(source, {"batch_size": 2})
    found = collect_moments(source, attentions, SampleReader([padded]), positions=1)
    for name, own in want.items():
        np.testing.assert_allclose(found[name].keys, own.keys, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found[name].queries, own.queries, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(np.asarray(found[name].centres), np.asarray(own.centres), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", ["optimum llama", "genai", "genai packed bias", "genai RoPE outside"])
def test_moments_are_those_of_later_positions_too(case: str) -> None:
    """A shift turns keys and leaves their length; over many positions quick pairs have no direction left."""
    source = EXPORTS[case]()
    reader = TokenReader(ModelInputs.from_path(source), IDS)
    attentions, _ = balanceable(Survey(model_io.load(source)))
    near, far = (collect_moments(source, attentions, reader, positions=count) for count in (1, 64))
    for name, own in near.items():
        lengths = [
            np.trace(found.keys, axis1=1, axis2=2) + np.square(found.centres).sum(axis=1)  # of Σ(k - c)² that of Σk²
            for found in (own, far[name])
            if found.centres is not None
        ]
        np.testing.assert_allclose(lengths[0], lengths[1], rtol=1e-3)
        assert np.abs(own.keys - far[name].keys).max() > 0.02 * np.abs(own.keys).max()


@pytest.mark.parametrize(("samples", "runs"), [(16, 16), (3, 18), (40, 40)])
def test_samples_are_spread_over_the_logarithm_of_positions(samples: int, runs: int) -> None:
    shifts = Shifts(("position_ids",), derived=False, positions=4096)
    feeds = [{"position_ids": np.arange(32)[None], "input_ids": np.full((1, 32), number)} for number in range(samples)]
    moved = shifts.all(feeds)
    found = [int(sample["position_ids"][0, 0]) for sample in moved]
    assert len(found) == runs
    assert found[0] == 0
    assert max(found) <= 4096 - 32
    assert {int(sample["input_ids"][0, 0]) for sample in moved} == set(range(samples))
    assert all(
        np.array_equal(sample["position_ids"][0] - start, np.arange(32))
        for sample, start in zip(moved, found, strict=True)
    )
    # As many between 8 and 64 as between 512 and 4096.
    counts = [sum(low <= shift < 8 * low for shift in found[1:]) for low in (8, 64, 512)]
    assert sum(counts) == runs - 1
    assert max(counts) - min(counts) <= 2


def test_samples_stay_where_positions_are_more_than_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that adds its positions to the stream computes other keys where a sample is moved."""
    source = EXPORTS["optimum llama"]()
    attentions, _ = balanceable(Survey(model_io.load(source)))
    reader = TokenReader(ModelInputs.from_path(source), IDS)
    seen: list[int] = []
    moved = Shifts.moved

    def noted(self: Shifts, feeds: Feeds, shift: int) -> Feeds:
        seen.append(shift)
        found = moved(self, feeds, shift)
        return {**found, "input_ids": np.where(shift, 7, found["input_ids"])}  # other keys

    monkeypatch.setattr(Shifts, "moved", noted)
    collect_moments(source, attentions, reader, positions=4096)
    assert seen[:2] == [0, 4096 - 24]
    assert set(seen[2:]) == {0}


@pytest.mark.parametrize(("way", "most"), [("ids", 100 - 24), ("unseen", 0)])
def test_samples_stay_where_a_table_ends(way: str, most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Learned positions: nothing behind the last row is asked for, or it is not asked for again."""
    source = learned_positions.write(tmp_path, 100, way)
    seen: list[int] = []
    moved = Shifts.moved

    def noted(self: Shifts, feeds: Feeds, shift: int) -> Feeds:
        seen.append(shift)
        return moved(self, feeds, shift)

    monkeypatch.setattr(Shifts, "moved", noted)
    reader = TokenReader(ModelInputs.from_path(source), IDS % cached_decoder.VOCAB)
    balance_in_place(source, Survey(model_io.load(source)), reader, tmp_path)
    assert max(seen[2:]) <= most
    if most:
        assert max(seen) <= most


@pytest.mark.parametrize("case", ["optimum llama", "optimum fp16", "genai"])
def test_piece_by_piece_is_the_same(case: str) -> None:
    source = EXPORTS[case]()
    attentions, _ = balanceable(Survey(model_io.load(source)))
    reader = TokenReader(ModelInputs.from_path(source), IDS)
    whole, pieces = (
        collect_moments(source, attentions, reader, positions=64, memory=memory)
        for memory in (WHOLE, Memory(1 << 20, by_stages=True))
    )
    for name, own in whole.items():
        np.testing.assert_array_equal(own.keys, pieces[name].keys)
        np.testing.assert_array_equal(own.queries, pieces[name].queries)
        np.testing.assert_array_equal(np.asarray(own.centres), np.asarray(pieces[name].centres))


@pytest.mark.parametrize(
    ("quarot", "cache", "balances"),
    [
        ({}, {"bits": 4}, True),
        ({}, {"k_bits": 4}, True),
        ({}, {"bits": 8}, False),
        ({}, {"v_bits": 4}, False),
        ({}, {"bits": 4, "form": "fake"}, False),
        ({}, {"bits": 4, "k_groupsize": 8}, False),
        ({}, {"k_bits": 4, "k_balance": False}, False),
        ({}, {"bits": 8, "k_balance": True}, True),
        ({"r3": True}, {"bits": 4}, False),
        ({"r3": False}, {"bits": 4}, False),
        (None, {"bits": 4}, False),
        (None, {"bits": 4, "k_balance": True}, True),
    ],
)
def test_when_keys_are_balanced(quarot: dict[str, Any] | None, cache: dict[str, Any], balances: bool) -> None:
    rotation = [] if quarot is None else [QuarotConfig(**quarot)]
    config = QConfig(None, algo_config=[*rotation, KVCacheConfig(**cache)])
    assert config.kv_cache is not None
    assert bool(config.kv_cache.k_balance) is balances
    assert QConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("case", ["optimum llama", "genai"])
@pytest.mark.parametrize(("options", "r3", "places"), [({}, False, True), ({"k_balance": False}, True, False)])
def test_the_record_tells_of_it(case: str, options: dict[str, Any], r3: bool, places: bool, tmp_path: Path) -> None:
    source = EXPORTS[case]()
    config = QConfig(None, algo_config=[QuarotConfig(), KVCacheConfig(4, 4, **options)])
    reader = TokenReader(ModelInputs.from_path(source), IDS)
    outcome = quantize(source, tmp_path / "model.onnx", config, reader, check=None)
    recipe = recorded(model_io.load(tmp_path / "model.onnx"))
    assert outcome.equivalence is not None
    assert recipe is not None
    assert ("R3" in recipe["rotation"]["counts"]) is r3  # type: ignore[index]
    found = [entry for entry in recipe.get("transforms") or () if entry["name"] == "kv_cache"]  # type: ignore[union-attr]
    assert bool(found) is places
    if places:
        assert found[0]["places"] == 2
        assert len(found[0]["caches"]) == 2


def test_all_steps_together(tmp_path: Path) -> None:
    """A random Hadamard, a prefix, GPTQ and a cache of 4 bits: proved, and the same when decoded."""
    source = EXPORTS["optimum llama"]()
    steps = [QuarotConfig(use_random_had=True, seed=3), SinkPrefixConfig("graph", ids=(7, 3))]
    config = QConfig(None, algo_config=[*steps, KVCacheConfig(4, 4)])
    reader = TokenReader(ModelInputs.from_path(source), IDS)
    quantize(source, tmp_path / "model.onnx", config, reader, check=None)
    whole, _ = outputs(tmp_path / "model.onnx", IDS[:1])
    decoded, _ = outputs(tmp_path / "model.onnx", IDS[:1], tuple(range(16, 24)))
    np.testing.assert_allclose(decoded, whole, atol=1e-4 * np.abs(whole).max())


def test_balanced_behind_r3(tmp_path: Path) -> None:
    source = EXPORTS["genai"]()
    rotate(source, tmp_path / "r" / "model.onnx", QuarotConfig(r3=True), verify=False)
    path = balance(tmp_path / "r" / "model.onnx", tmp_path / "model.onnx")
    exact, _ = outputs(source, IDS[:1])
    found, _ = outputs(path, IDS[:1], (12,))
    np.testing.assert_allclose(found, exact, atol=1e-4 * np.abs(exact).max())


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="k_balance=True: keys are balanced behind RoPE, and k_pre_rope=True"):
        KVCacheConfig(3, k_pre_rope=True, k_balance=True)
    source = EXPORTS["optimum llama"]()
    config = QConfig(None, algo_config=[QuarotConfig(), KVCacheConfig(4)])
    with pytest.raises(CalibrationError, match=r"kv_cache needs calibration data: .* \(k_balance=False, "):
        quantize(source, tmp_path / "model.onnx", config)
    given = model_io.load(source)
    prefix = {"name": "sink_prefix", "caches": [], "config": {"form": "graph", "ids": [7]}}
    record(given, {"transforms": [prefix]})
    model_io.save(given, tmp_path / "p.onnx")
    reader = TokenReader(ModelInputs.from_path(source), IDS)
    alone = QConfig(None, algo_config=[KVCacheConfig(4, k_balance=True)])
    with pytest.raises(ModelError, match="cannot be balanced any more"):
        quantize(tmp_path / "p.onnx", tmp_path / "model.onnx", alone, reader)
    assert not (tmp_path / "model.onnx").exists()
