"""What is drawn from, by hand, and that a seed tells all."""

from math import exp, log

import numpy as np
import pytest

from quarot_onnx.errors import ConfigError
from quarot_onnx.generation.sampling import Sampling, candidates, next_token

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))


def drawn_from(**options: object) -> dict[int, float]:
    ids, weights = candidates(LOGITS, Sampling.from_dict(options))
    return dict(zip(ids.tolist(), weights.tolist(), strict=True))


def test_all_by_default() -> None:
    assert drawn_from() == pytest.approx({0: 0.1, 1: 0.4, 2: 0.05, 3: 0.25, 4: 0.2})


def test_temperature_divides_logits() -> None:
    squares = [exp(2 * log(p)) for p in (0.1, 0.4, 0.05, 0.25, 0.2)]
    assert drawn_from(temperature=0.5) == pytest.approx({i: p / sum(squares) for i, p in enumerate(squares)})


def test_top_k_keeps_the_likeliest() -> None:
    assert drawn_from(top_k=2) == pytest.approx({1: 0.4 / 0.65, 3: 0.25 / 0.65})
    assert drawn_from(top_k=99) == pytest.approx(drawn_from())


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [1]), (0.39, [1]), (0.5, [1, 3]), (0.64, [1, 3]), (0.7, [1, 3, 4]), (1.0, [1, 3, 4, 0, 2])],
)
def test_top_p_keeps_the_fewest_that_make_it_up(top_p: float, kept: list[int]) -> None:
    shares = {i: float(np.exp(LOGITS[i])) for i in kept}
    found = drawn_from(top_p=top_p)
    assert list(found) == kept
    assert found == pytest.approx({i: p / sum(shares.values()) for i, p in shares.items()})


def test_top_p_is_taken_of_what_top_k_leaves() -> None:
    # Of 0.4 and 0.25 alone the first is 0.615.
    assert list(drawn_from(top_k=2, top_p=0.61)) == [1]
    assert list(drawn_from(top_k=2, top_p=0.62)) == [1, 3]


@pytest.mark.parametrize("top_k", [None, 1, 7, 300, 5000])
@pytest.mark.parametrize("top_p", [None, 1e-20, 1e-6, 0.3, 0.9, 0.9999, 1.0])
def test_cuts_are_those_of_all_logits_sorted(top_k: int | None, top_p: float | None) -> None:
    """Few logits are sorted; equal ones among them."""
    logits = np.random.default_rng(1).normal(0, 3, 1000).round(1).astype(np.float32)
    sampling = Sampling(temperature=0.8, top_k=top_k, top_p=top_p)
    order = sorted(range(1000), key=lambda i: (-logits[i], i))[:top_k]
    shares = np.exp(logits[order].astype(np.float64) / 0.8)
    shares /= shares.sum()
    before = np.concatenate([[0.0], np.cumsum(shares)[:-1]])
    kept = int((before < (top_p or 1.1)).sum())
    found = dict(zip(*(array.tolist() for array in candidates(logits, sampling)), strict=True))
    expected = dict(zip(order[:kept], (shares[:kept] / shares[:kept].sum()).tolist(), strict=True))
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected)


def test_a_temperature_near_zero_is_greedy() -> None:
    ids, weights = candidates(LOGITS, Sampling(temperature=1e-310))
    assert dict(zip(ids.tolist(), weights.tolist(), strict=True)) == {0: 0, 1: 1, 2: 0, 3: 0, 4: 0}


def test_of_equal_logits_the_lowest_ids() -> None:
    ids, weights = candidates(np.zeros(8, np.float32), Sampling(top_k=3))
    assert ids.tolist() == [0, 1, 2]
    assert weights == pytest.approx([1 / 3] * 3)
    assert next_token(np.zeros(8, np.float32), None, np.random.default_rng(0)) == 0


def test_a_masked_token_is_never_drawn() -> None:
    logits = np.array([0.0, -np.inf, 0.0], np.float32)
    rng = np.random.default_rng(0)
    assert {next_token(logits, Sampling(), rng) for _ in range(200)} == {0, 2}


def test_shares_of_many_draws() -> None:
    rng, count = np.random.default_rng(5), 20_000
    draws = np.bincount([next_token(LOGITS, Sampling(), rng) for _ in range(count)], minlength=5) / count
    # Five standard deviations of a share, at most 0.5 / sqrt(count) each.
    assert np.abs(draws - np.exp(LOGITS)).max() < 5 * 0.5 / count**0.5


def test_a_seed_tells_all() -> None:
    def draws(seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        return [next_token(LOGITS, Sampling(seed=seed), rng) for _ in range(40)]

    assert draws(3) == draws(3) != draws(4)


@pytest.mark.parametrize(
    ("option", "value"), [("temperature", 0.0), ("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.1)]
)
def test_what_is_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{option}={value}"):
        Sampling.from_dict({option: value})


@pytest.mark.parametrize("count", [1, 2, 3, 7, 49, 1000])
def test_one_is_left_of_tokens_that_are_equally_likely(count: int) -> None:
    ids, probabilities = candidates(np.full(count, 0.3, np.float32), Sampling(top_p=1e-20))
    assert (list(ids), list(probabilities)) == ([0], [1.0])
