import numpy as np
import pytest

from quarot_onnx.evaluation.logits import log_softmax, negative_log_likelihood
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


def test_log_softmax_does_not_overflow():
    np.testing.assert_allclose(
        log_softmax(np.array([[1e4, 1e4 - 1]])), [np.log([1 / (1 + np.exp(-1)), 1 / (1 + np.e)])]
    )


def test_negative_log_likelihood():
    logits, targets = np.random.default_rng(0).standard_normal((70, 5)), np.arange(70) % 5
    want = -np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[np.arange(70), targets]
    np.testing.assert_allclose(negative_log_likelihood(logits, targets), want, rtol=1e-12)
