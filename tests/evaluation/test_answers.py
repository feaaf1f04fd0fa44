"""Continuations get the likelihood that their logits say, whatever runs beside them and whatever a graph fixes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import exports
import numpy as np
import odd_decoders as odd
import onnxruntime as ort
import pytest
import tiny_decoders as tiny
from command_line import Shell
from onnxruntime.quantization import quantize_dynamic

from quarot_onnx import QuarotConfig
from quarot_onnx.config.algorithm import SinkPrefixConfig
from quarot_onnx.errors import CalibrationError, FeedError, ModelError
from quarot_onnx.evaluation.answers import Answers
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.pipeline import rotate

# A float32 logit of order 10 has a rounding error of about 1e-6 · the square root of the products that it is summed of;
# an answer sums at most 12 of them.
ROUNDING = 1e-4

Pairs = list[tuple[list[int], list[int]]]


def drawn(vocab: int, sizes: list[tuple[int, int]], seed: int = 0) -> Pairs:
    rng = np.random.default_rng(seed)
    return [(rng.integers(2, vocab, c).tolist(), rng.integers(2, vocab, a).tolist()) for c, a in sizes]


SIZES = [(5, 3), (1, 1), (9, 4), (5, 3), (4, 4), (6, 2), (12, 12), (7, 1), (2, 6)]


def totals(found: list[tuple[float, bool]]) -> np.ndarray:
    return np.array([total for total, _ in found])


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return tiny.save(tiny.build(tiny.Spec(cache=False)), tmp_path / "plain")


def by_hand(path: Path, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """Token by token, each from a run of what comes before it, in plain NumPy."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    total, greedy = 0.0, True
    for i, token in enumerate(answer):
        ids = np.array([context + answer[:i]])
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.size)[None]}
        last = session.run(["logits"], feeds)[0][0, -1].astype(np.float64)
        total += last[token] - np.log(np.exp(last).sum())
        greedy &= bool(last.argmax() == token)
    return total, greedy


def test_it_is_the_sum_of_log_probabilities(plain: Path) -> None:
    pairs = drawn(tiny.VOCAB, SIZES)
    greedy = list(pairs[0][0])
    session = ort.InferenceSession(str(plain), providers=["CPUExecutionProvider"])
    for _ in range(3):
        ids = np.array([greedy])
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.size)[None]}
        greedy.append(int(session.run(["logits"], feeds)[0][0, -1].argmax()))
    pairs.append((greedy[:-3], greedy[-3:]))
    seen: list[tuple[int, int]] = []
    found = Answers(plain, batch_size=2).score(pairs, lambda *now: seen.append(now))
    expected = [by_hand(plain, *pair) for pair in pairs]
    np.testing.assert_allclose(totals(found), totals(expected), atol=ROUNDING)
    assert [same for _, same in found] == [same for _, same in expected]
    assert found[-1][1]
    assert not all(same for _, same in found)
    assert seen[-1] == (len(pairs), len(pairs))
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    "export",
    [
        lambda: exports.optimum_export("llama"),
        exports.genai_like,
        lambda: exports.dynamo_export("llama"),
    ],
    ids=["optimum", "genai", "dynamo"],
)
def test_nothing_depends_on_the_batch(export: Callable[[], Path]) -> None:
    path = export()
    # Lengths that occur once, twice and four times; equal rows that end in different tokens.
    pairs = drawn(250, [*SIZES, (4, 4), (3, 5), (11, 2)])
    pairs += [(pairs[0][0], [*pairs[0][1][:-1], token]) for token in (3, 4)]
    one, three = (totals(Answers(path, batch_size=size).score(pairs)) for size in (1, 3))
    np.testing.assert_allclose(three, one, atol=ROUNDING)
    alone = [Answers(path).score([pair])[0][0] for pair in pairs]
    np.testing.assert_allclose(one, alone, atol=ROUNDING)
    assert len(set(one.round(2))) > len(pairs) // 2


@pytest.mark.parametrize(
    "export", [lambda: exports.optimum_export("llama"), exports.genai_like], ids=["optimum", "genai"]
)
def test_piece_by_piece_is_the_same(export: Callable[[], Path]) -> None:
    path, pairs = export(), drawn(250, [*SIZES, (4, 4), (3, 5)])
    whole = Answers(path, batch_size=2, memory=WHOLE).score(pairs)
    seen: list[tuple[int, int | None]] = []
    pieces = Answers(path, batch_size=2, memory=Memory(320_000, by_stages=True))
    assert pieces.score(pairs, lambda *now: seen.append(now)) == whole
    assert seen[-1][0] == seen[-1][1]
    assert len(seen) == seen[-1][1]
    assert seen == sorted(seen)


def test_rows_that_would_share_a_scale_run_alone(tmp_path: Path) -> None:
    quantize_dynamic(exports.optimum_export("llama"), tmp_path / "model.onnx")
    pairs = drawn(250, [(6, 2)] * 4)
    one, three = (Answers(tmp_path / "model.onnx", batch_size=size).score(pairs) for size in (1, 3))
    assert one == three


def test_equal_rows_are_run_once(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, runs = Answers(plain), []
    inner = answers._batch
    monkeypatch.setattr(answers, "_batch", lambda rows, *rest: runs.append(rows) or inner(rows, *rest))
    context = [5, 6, 7]
    found = answers.score([(context, [8, token]) for token in range(2, 12)])
    assert len(runs) == 1
    np.testing.assert_allclose(totals(found), [by_hand(plain, context, [8, t])[0] for t in range(2, 12)], atol=ROUNDING)


def test_what_is_too_long_is_cut_on_the_left(plain: Path) -> None:
    (plain.parent / "config.json").write_text(json.dumps({"max_position_embeddings": 10}))
    answers = Answers(plain)
    assert answers.positions == 10
    context, answer = drawn(tiny.VOCAB, [(20, 4)])[0]
    (found,) = answers.score([(context, answer)])
    assert found[0] == pytest.approx(by_hand(plain, context[-7:], answer)[0], abs=ROUNDING)
    assert "1 rows were longer than 10 tokens" in answers.notes()[0]
    exact = Answers(plain)
    exact.score([(context[-7:], answer)])
    assert not exact.notes()
    with pytest.raises(CalibrationError, match="an answer of 11 tokens does not fit into the 10"):
        answers.score([(context, context[:11])])


@pytest.mark.parametrize(
    ("spec", "positions"),
    [
        (odd.Spec(batch=2), 2048),
        (odd.Spec(batch=1, seq=1), 2048),
        (odd.Spec(batch=1, seq=8, past=56, mask="ones"), 64),
        (odd.Spec(batch=3, seq=32, past=0), 32),
        (odd.Spec(batch=2, seq=8), 2048),
    ],
)
def test_graphs_that_fix_their_lengths(spec: odd.Spec, positions: int, tmp_path: Path) -> None:
    pairs = drawn(odd.VOCAB, SIZES)
    expected = totals(Answers(odd.write(tmp_path / "free", odd.Spec())).score(pairs))
    answers = Answers(odd.write(tmp_path / "fixed", spec), batch_size=4)
    assert answers.positions == positions
    np.testing.assert_allclose(totals(answers.score(pairs)), expected, atol=ROUNDING)


PREFIX = [exports.BOS, 17]


@pytest.fixture(params=["optimum", "genai"])
def export(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    source = exports.optimum_export("llama") if request.param == "optimum" else exports.genai_like()
    shutil.copytree(source.parent, tmp_path / "plain")
    return tmp_path / "plain" / "model.onnx"


def test_a_prefix_is_fed_no_second_time(export: Path, tmp_path: Path) -> None:
    led = tmp_path / "led" / "model.onnx"
    rotate(export, led, QuarotConfig(), prefix=SinkPrefixConfig(form="graph", ids=tuple(PREFIX)))
    pairs = drawn(250, SIZES)
    whole, ours = Answers(export), Answers(led, batch_size=3)
    expected = totals(whole.score([(PREFIX + context, answer) for context, answer in pairs]))
    # float32 noise of a rotation, beside what a prefix changes.
    assert np.abs(expected - totals(whole.score(pairs))).max() > 0.1
    for before in ([], PREFIX, PREFIX[:1]):
        asked = [(before + context, answer) for context, answer in pairs]
        np.testing.assert_allclose(totals(ours.score(asked)), expected, atol=1e-3)
    # Its last logits are not kept, so that a context which is the BOS alone is fed.
    (bare,) = ours.score([([exports.BOS], [9, 8])])
    (fed,) = whole.score([([*PREFIX, exports.BOS], [9, 8])])
    assert bare[0] == pytest.approx(fed[0], abs=1e-3)
    assert "the model brings the prefix" in ours.notes()[0]


def test_a_prefix_that_is_fed_stands_before_every_row(export: Path, shell: Shell, tmp_path: Path) -> None:
    for form in ("graph", "npz"):
        ids = ",".join(map(str, PREFIX))
        options = ("--scheme", "w8", "--no-rotate", "--prefix", form, "--prefix-ids", ids, "--no-check")
        shell.ok("quantize", export, tmp_path / form / "model.onnx", *options)
    pairs = drawn(250, SIZES)
    graph, npz = (
        totals(Answers(tmp_path / form / "model.onnx", batch_size=3).score(pairs)) for form in ("graph", "npz")
    )
    # onnxruntime rounds the activations beside 8-bit weights to 8 bits: a last digit of a float can become one step.
    np.testing.assert_allclose(npz, graph, atol=1e-2)


def test_refusals(plain: Path, tmp_path: Path) -> None:
    answers = Answers(plain)
    with pytest.raises(CalibrationError, match="an answer of a task has no tokens"):
        answers.score([([3], [])])
    with pytest.raises(CalibrationError, match="a context of a task has no tokens"):
        answers.score([([], [3])])
    with pytest.raises(CalibrationError, match="token id 32 is outside"):
        answers.score([([3], [tiny.VOCAB])])
    with pytest.raises(FeedError, match="evaluate one that does"):
        Answers(odd.write(tmp_path / "embedded", odd.Spec(ids="embedded")))
    arrays = tiny.weights()
    arrays["Wh"][:] = np.inf
    with pytest.raises(ModelError, match="not finite"):
        Answers(tiny.save(tiny.build(tiny.Spec(cache=False), arrays), tmp_path / "broken")).score([([3], [4])])
