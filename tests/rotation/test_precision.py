"""What float16 and bfloat16 weights lose by float32 arithmetic: against float64, next to nothing; what threads change.

With u = 2⁻²⁴, a handful of products and sums of 16 to 344 terms err by some u·r each, r the root mean square of a row:
by less than 64 u·r. A number is then stored as another one only where the exact one lies nearer than that to the middle
between two, and as its neighbour: off by one spacing, s ≥ 2⁻¹¹|y| for float16 and 2⁻⁸|y| for bfloat16. Where spacings
are below the error (bfloat16's near nothing) it may be off by the error. With errors of 3 u·r that is a share of
2 · 3u·r / s, 0.07 % of float16 numbers at |y| = r, some times that with the smaller ones: less than 0.4 %.
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from quarot_onnx.graph.query import Constant
from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.rotation.transform import Rotate, Scale, Step, WeightTransform
from quarot_onnx.threads import limited_to

U = 2.0**-24
KINDS = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
RNG = np.random.default_rng(0)


def orthogonal(size: int) -> Rotation:
    return Rotation.dense(np.linalg.qr(RNG.standard_normal((size, size)))[0])


def constant(array: NDArray) -> Constant:
    tensor = ir.tensor(array)
    return Constant(ir.Value(name="w", const_value=tensor), tensor, transposed=False, dtype=tensor.dtype)


# Rows, columns, and the rotations along them: as in Llama-2-7B, Qwen2-7B and SmolLM2; a learned one.
CASES: dict[str, tuple[int, int, Rotation | None, Rotation | None]] = {
    "R1 of 4096": (4096, 48, Rotation.hadamard(4096, seed=1), None),
    "R1 of 512 behind R4 of 1376": (1376, 512, Rotation.hadamard(1376), Rotation.hadamard(512, seed=1)),
    "R1 of 3584 behind a table": (48, 3584, None, Rotation.hadamard(3584, seed=1)),
    "R4 of 18944": (18944, 48, Rotation.hadamard(18944), None),
    "heads of 128": (1024, 48, Rotation.hadamard(128), None),
    "a dense R1": (512, 64, orthogonal(512), None),
}


def pair(kind: np.dtype, case: str) -> tuple[NDArray, NDArray, NDArray]:
    """What is stored; the exact result; and that rounded once."""
    rows, columns, down, across = CASES[case]
    gamma = (1 + 0.3 * RNG.standard_normal(rows)).astype(kind)
    weight = (0.02 * RNG.standard_normal((rows, columns), np.float32)).astype(kind)
    steps: list[Step] = [Scale(0, ir.tensor(gamma))]
    exact = weight.astype(np.float64) * gamma.astype(np.float64)[:, None]
    if down is not None:
        steps.append(Rotate(0, down))
        exact = down.apply(exact.reshape(-1, down.size, columns), 1).reshape(rows, columns)
    if across is not None:
        steps.append(Rotate(1, across))
        exact = across.apply(exact, 1)
    return WeightTransform(constant(weight), tuple(steps)).evaluate(), exact, exact.astype(kind)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_float32_is_exact_enough(kind: np.dtype, case: str) -> None:
    stored, exact, once = pair(kind, case)
    size = np.sqrt(np.mean(exact**2))
    kept = ml_dtypes.finfo(kind)
    spacing = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), float(kept.smallest_normal)))) - kept.nmant)
    off = np.abs(stored.astype(np.float64) - once.astype(np.float64))
    assert stored.dtype == kind
    assert (off <= np.maximum(spacing, 64 * U * size)).all()
    assert np.mean(stored != once) < 0.004


@pytest.mark.parametrize("kind", [*KINDS.values(), np.dtype(np.float32)], ids=[*KINDS, "float32"])
@pytest.mark.parametrize("transposed", [False, True], ids=["in out", "out in"])
def test_the_number_of_threads_changes_no_bit(kind: np.dtype, transposed: bool) -> None:
    weight = RNG.standard_normal((1376, 1024), np.float32).astype(kind)  # in several blocks, of columns and of rows
    steps = (Rotate(1, Rotation.hadamard(1024, seed=1)), Rotate(0, Rotation.hadamard(1376)))
    tensor = ir.tensor(np.ascontiguousarray(weight.T) if transposed else weight)
    source = Constant(ir.Value(name="w", const_value=tensor), tensor, transposed, tensor.dtype)
    found = []
    for jobs in (1, 2, 5):
        with limited_to(jobs):
            found.append(WeightTransform(source, steps).evaluate().view(np.uint8))
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()
