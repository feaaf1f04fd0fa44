"""What rounding alone does to the original counts in a proof."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx.errors import VerificationError
from quarot_onnx.evaluation.equivalence import Equivalence, Tolerance, compare, require
from quarot_onnx.evaluation.measures import Measures
from quarot_onnx.evaluation.noise import OwnNoise

STEP = np.float16(2.0**-10)
"""A rounding of float16 between 1 and 2."""

ROWS = 2000
"""All but the first are what rounding does not move."""


def save(path: Path, weights: NDArray[np.float16], *, vector: bool = True) -> Path:
    """``y = (x · w) @ W``: the difference of two features, whose weights are some roundings apart."""
    matrix = np.array([[64, 32], [-64, -32]], np.float16)
    scales = weights if vector else weights[None]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["scaled"]), helper.make_node("MatMul", ["scaled", "W"], ["y"])],
        "cancelling",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [ROWS, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [ROWS, 2])],
        [numpy_helper.from_array(scales, "w"), numpy_helper.from_array(matrix, "W")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def compared(
    tmp_path: Path, moved: float, *, apart: int = 16, vector: bool = True, tolerance: Tolerance | None = None
) -> Equivalence:
    """The model beside one whose first scale is moved by so many roundings."""
    weights = np.array([1 + apart * STEP, 1], np.float16)
    other = (weights + np.array([moved * STEP, 0])).astype(np.float16)
    feeds = [{"x": np.array([[1, 1], *[[1 / 64, 0]] * (ROWS - 1)], np.float16)}]
    a, b = save(tmp_path / "a.onnx", weights, vector=vector), save(tmp_path / "b.onnx", other, vector=vector)
    return compare(a, b, feeds=feeds, tolerance=tolerance)


def test_a_rounding_that_is_magnified_passes(tmp_path: Path) -> None:
    found = compared(tmp_path, 1)
    assert found.max_rel_logit_diff == pytest.approx(1 / 16, rel=0.05)  # more than float16 is allowed
    assert found.passed
    assert found.own_noise == pytest.approx(2 / 16, rel=0.05)  # both moved, away from each other
    assert found.tolerance.max_rel == pytest.approx(4 * found.own_noise)
    assert found.tolerance.rel_l2 == 0.02
    require(found)


def test_a_fault_does_not(tmp_path: Path) -> None:
    found = compared(tmp_path, 12, apart=64)
    assert found.rel_l2 < 0.02
    assert not found.passed
    with pytest.raises(VerificationError, match=r"relative 0\.188 \(allowed 0\.125\).*moves the original by 0\.0312"):
        require(found)


def test_nothing_excuses_more_than_half_of_the_largest(tmp_path: Path) -> None:
    found = compared(tmp_path, 11)
    assert found.rel_l2 < 0.02
    assert not found.passed
    assert found.own_noise is None


def test_nothing_is_measured_where_rounding_explains_nothing(tmp_path: Path) -> None:
    """All values are off, by less each than a single one may be."""
    weights = np.array([1 + 16 * STEP, 1], np.float16)
    larger = (weights * np.float16(1.03)).astype(np.float16)
    a, b = save(tmp_path / "a.onnx", weights), save(tmp_path / "b.onnx", larger)
    found = compare(a, b, feeds=[{"x": np.array([[1 / 64, 0]] * ROWS, np.float16)}])
    assert found.max_rel_logit_diff < 0.05
    assert found.rel_l2 > 0.02
    assert not found.passed
    assert found.own_noise is None


def test_what_is_kept_is_not_measured_again(tmp_path: Path) -> None:
    found = compared(tmp_path, 0)
    assert found.passed
    assert found.own_noise is None
    assert found.tolerance.max_rel == 0.05


def test_a_tolerance_that_is_given_holds(tmp_path: Path) -> None:
    found = compared(tmp_path, 1, tolerance=Tolerance(0.01, 0.01))
    assert not found.passed
    assert found.own_noise is None


def test_without_vectors_of_weights(tmp_path: Path) -> None:
    found = compared(tmp_path, 1, vector=False)
    assert not found.passed
    assert found.own_noise is None


def test_limits() -> None:
    limits = Tolerance(0.05, 0.02)
    assert OwnNoise(0.001).widened(limits) == limits
    assert OwnNoise(0.02).widened(limits) == Tolerance(0.08, 0.02)
    assert OwnNoise(2.0).widened(limits) == Tolerance(0.5, 0.02)


def test_a_draw_that_overflows_tells_nothing() -> None:
    noise, measures = OwnNoise(0.1), Measures()
    measures.add(np.ones((1, 4)), np.full((1, 4), np.inf))
    noise.add(measures)
    assert noise.max_rel == 0.1
