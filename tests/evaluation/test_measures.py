import numpy as np
import pytest

from quarot_onnx.evaluation.logits import log_softmax, negative_log_likelihood, readable
from quarot_onnx.evaluation.measures import Measures


def test_figures_of_a_small_case():
    a, b = np.array([[3.0, 0.0], [0.0, 4.0]]), np.array([[3.0, 1.0], [0.0, 4.0]])
    measures = Measures()
    measures.add(a[:1], b[:1])
    measures.add(a[1:], b[1:])
    assert (measures.max_abs, measures.max_rel, measures.rel_l2) == (1.0, 0.25, 0.2)
    p, q = np.exp(3) / (np.exp(3) + 1), np.exp(3) / (np.exp(3) + np.exp(1))
    want = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))) / 2
    assert measures.kl == pytest.approx(want, rel=1e-12)


def test_rows_are_counted_across_blocks():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((150, 7)).astype(np.float32)
    b = a + rng.standard_normal(a.shape).astype(np.float32) / 10
    measures = Measures()
    measures.add(a, b)
    diff = b.astype(np.float64) - a
    assert measures.rows == 150
    assert measures.rel_l2 == pytest.approx(np.linalg.norm(diff) / np.linalg.norm(a.astype(np.float64)), rel=1e-12)
    assert measures.top1_agreement(0.0) == np.mean(a.argmax(1) == b.argmax(1))


def test_only_flips_between_near_ties_agree():
    measures = Measures()
    measures.add(np.array([[1.0, 0.9], [1.0, 0.0], [1.0, 0.0]]), np.array([[0.9, 1.0], [0.0, 1.0], [1.0, 0.0]]))
    assert measures.top1_agreement(0.0) == pytest.approx(1 / 3)
    assert measures.top1_agreement(0.2) == pytest.approx(2 / 3)


def test_nan_in_the_second_model_is_an_infinite_difference():
    measures = Measures()
    measures.add(np.ones((1, 2)), np.array([[1.0, np.nan]]))
    measures.add(np.ones((1, 2)), np.ones((1, 2)))
    assert measures.max_rel == measures.rel_l2 == np.inf
    assert measures.top1_agreement(10.0) == 0.5


NEVER = [-1e9, float(np.finfo(np.float32).min), -1e4]


@pytest.mark.parametrize("never", NEVER)
def test_tokens_that_never_come_hide_nothing(never):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((20, 9)).astype(np.float32)
    b = a + rng.standard_normal(a.shape).astype(np.float32)
    without = Measures()
    without.add(a[:, :7], b[:, :7])
    a[:, 7:] = b[:, 7:] = never
    b[:, 8] -= 5000  # in whatever way they never come
    measures = Measures()
    measures.add(a, b)
    for figure in ("max_abs", "max_rel", "rel_l2", "largest"):
        assert getattr(measures, figure) == pytest.approx(getattr(without, figure), rel=1e-12)
    assert measures.kl == pytest.approx(without.kl, rel=1e-12)
    assert measures.top1_agreement(0.1) == without.top1_agreement(0.1) < 1


def test_what_never_comes_in_one_model_alone_differs():
    a = np.array([[1.0, 0.5, -1e9], [1.0, 0.5, 0.1]])
    for first, second in ((a, a[::-1]), (a[::-1], a)):
        measures = Measures()
        measures.add(first, second)
        assert measures.max_abs >= 1e9
        assert not measures.kl < 1e-3


def test_other_outputs_have_no_tokens_that_never_come():
    measures = Measures(distributions=False)
    measures.add(np.array([[5000.0, 1.0]]), np.array([[5000.0, 2.0]]))
    assert measures.max_abs == 1.0


def test_minus_infinity_is_the_lowest_number():
    logits = np.array([[1.0, -np.inf], [0.5, 2.0]], np.float32)
    found = readable(logits)
    assert found is not None
    assert found.tolist() == [[1.0, float(np.finfo(np.float32).min)], [0.5, 2.0]]
    assert np.isneginf(logits[0, 1])
    same = readable(found)
    assert same is found
    for wild in ([[-np.inf, -np.inf]], [[np.inf, 0.0]], [[np.nan, 0.0]]):
        assert readable(np.array(wild)) is None


def test_log_softmax_does_not_overflow():
    np.testing.assert_allclose(
        log_softmax(np.array([[1e4, 1e4 - 1]])), [np.log([1 / (1 + np.exp(-1)), 1 / (1 + np.e)])]
    )


def test_negative_log_likelihood():
    logits, targets = np.random.default_rng(0).standard_normal((70, 5)), np.arange(70) % 5
    want = -np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[np.arange(70), targets]
    np.testing.assert_allclose(negative_log_likelihood(logits, targets), want, rtol=1e-12)
