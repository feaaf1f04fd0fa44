"""A recipe computes what its algebra says, in blocks, and rounds once."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from quarot_onnx.errors import ModelError
from quarot_onnx.graph.query import Constant
from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.rotation import transform as module
from quarot_onnx.rotation.transform import Rotate, Scale, Step, WeightTransform

ROWS, COLUMNS = 24, 16
RNG = np.random.default_rng(0)
W = RNG.standard_normal((ROWS, COLUMNS)).astype(np.float32)
GAMMA = RNG.uniform(0.5, 1.5, ROWS).astype(np.float32)
IN, OUT = Rotation.hadamard(ROWS, seed=1), Rotation.hadamard(COLUMNS, seed=2)

# One rounding of float64 to float32; the products of 24 terms in float64 add nothing to it.
EXACT = {"rtol": 6.0e-8, "atol": 1e-12}


def constant(array: NDArray, *, transposed: bool = False) -> Constant:
    tensor = ir.tensor(np.ascontiguousarray(array.T) if transposed else array)
    return Constant(ir.Value(name="w", const_value=tensor), tensor, transposed, tensor.dtype)


CASES: dict[str, tuple[tuple[Step, ...], NDArray[np.float64]]] = {
    "writer": ((Rotate(1, OUT),), W @ OUT.matrix()),
    "reader": ((Scale(0, ir.tensor(GAMMA)), Rotate(0, IN)), IN.matrix().T @ (GAMMA.astype(float)[:, None] * W)),
    "gamma minus one": ((Scale(0, ir.tensor(GAMMA), 1.0),), (GAMMA.astype(float)[:, None] + 1) * W),
    "both": ((Rotate(1, OUT), Rotate(0, IN), Scale(0, None, factor=0.75)), 0.75 * (IN.matrix().T @ W @ OUT.matrix())),
    "heads": (
        (Rotate(1, Rotation.hadamard(4), 8, 16),),
        np.hstack([W[:, :8], W[:, 8:] @ np.kron(np.eye(2), Rotation.hadamard(4).matrix())]),
    ),
    "heads of rows": (
        (Rotate(0, Rotation.hadamard(12)),),
        np.kron(np.eye(2), Rotation.hadamard(12).matrix()).T @ W,
    ),
}


@pytest.mark.parametrize("elements", [1, 24 * 5, 2**20], ids=["one row", "five rows", "whole"])
@pytest.mark.parametrize("layout", ["in out", "out in", "kept out in"])
@pytest.mark.parametrize("case", CASES)
def test_the_algebra(case: str, layout: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(module, "_NARROWEST", 1)
    steps, expected = CASES[case]
    kept = layout == "kept out in"
    made = WeightTransform(constant(W, transposed=layout != "in out"), steps, stored_transposed=kept)
    result = made.evaluate()
    assert result.shape == made.shape == (expected.T.shape if kept else expected.shape)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result.T if kept else result, expected, **EXACT)


@pytest.mark.parametrize("elements", [1, 24 * 5, 2**20], ids=["one row", "five rows", "whole"])
@pytest.mark.parametrize("transposed", [False, True], ids=["in out", "out in"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("case", CASES)
def test_from_a_file_as_from_memory(
    case: str, dtype: type, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, transposed: bool
) -> None:
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(module, "_NARROWEST", 1)
    held = constant(W.astype(dtype), transposed=transposed)
    path = tmp_path / "data"
    path.write_bytes(bytes(64) + held.tensor.tobytes())
    place = {"shape": held.tensor.shape, "name": "w"}
    stored = ir.ExternalTensor(str(path), 64, held.tensor.nbytes, held.dtype, **place)
    steps, _ = CASES[case]
    found, expected = (
        WeightTransform(Constant(held.value, tensor, transposed, held.dtype), steps).evaluate()
        for tensor in (stored, held.tensor)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS)])
def test_a_bias_rotates_with_the_output_side(shape: tuple[int, ...]) -> None:
    bias = RNG.standard_normal(shape).astype(np.float32)
    result = WeightTransform(constant(bias), (Rotate(1, OUT),)).evaluate()
    assert result.shape == shape
    np.testing.assert_allclose(result, bias @ OUT.matrix(), **EXACT)


def test_float16_is_rounded_once() -> None:
    half = W.astype(np.float16)
    steps: tuple[Step, ...] = (Scale(0, ir.tensor(GAMMA.astype(np.float16))), Rotate(0, IN))
    expected = IN.matrix().T @ (GAMMA.astype(np.float16).astype(float)[:, None] * half)
    np.testing.assert_array_equal(WeightTransform(constant(half), steps).evaluate(), expected.astype(np.float16))


def test_float16_behind_a_cast_to_float32_is_computed_in_float64() -> None:
    half = ir.tensor(W.astype(np.float16))
    source = Constant(ir.Value(name="w", const_value=half), half, transposed=False, dtype=ir.DataType.FLOAT)
    result = WeightTransform(source, (Rotate(1, OUT), Rotate(0, IN))).evaluate()
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, IN.matrix().T @ W.astype(np.float16).astype(float) @ OUT.matrix(), **EXACT)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_is_not_finite_spreads_nowhere(dtype: type, axis: int, value: float) -> None:
    spoiled = W.astype(dtype)
    spoiled[3, 4] = value
    with pytest.raises(ModelError, match="the weight 'w' holds NaN or infinity, and nothing can be made of it"):
        WeightTransform(constant(spoiled), (Rotate(axis, (IN, OUT)[axis]),)).evaluate()


def test_large_numbers_whose_squares_overflow_are_finite() -> None:
    large = np.full(W.shape, 3e38, ml_dtypes.bfloat16)
    made = WeightTransform(constant(large), (Scale(0, None, factor=0.5),)).evaluate()
    np.testing.assert_array_equal(made, large * ml_dtypes.bfloat16(0.5))


def test_a_tensor_is_evaluated_when_it_is_read() -> None:
    tensor = WeightTransform(constant(W), (Rotate(1, OUT),)).tensor("w")
    assert isinstance(tensor, ir.LazyTensor)
    assert (tensor.dtype, tuple(tensor.shape)) == (ir.DataType.FLOAT, W.shape)
    np.testing.assert_allclose(tensor.numpy(), W @ OUT.matrix(), **EXACT)


def test_equal_recipes_are_recognised() -> None:
    source, gamma = constant(W), ir.tensor(GAMMA)

    def reader(seed: int, vector: ir.TensorProtocol) -> WeightTransform:
        return WeightTransform(source, (Scale(0, vector), Rotate(0, Rotation.hadamard(ROWS, seed=seed))))

    assert reader(1, gamma).same_as(reader(1, gamma))
    assert not reader(1, gamma).same_as(reader(2, gamma))
    assert not reader(1, gamma).same_as(reader(1, ir.tensor(GAMMA)))
    assert not reader(1, gamma).same_as(WeightTransform(constant(W), reader(1, gamma).steps))
