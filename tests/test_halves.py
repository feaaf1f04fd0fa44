"""float16 and float32 into each other: NumPy's own results, bit for bit; NaN stays NaN, whichever."""

import numpy as np
import pytest
from numpy.typing import NDArray

from quarot_onnx.io import halves as module
from quarot_onnx.io.halves import narrow, widen
from quarot_onnx.threads import limited_to, spread

ALL = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = np.sort(ALL[np.isfinite(ALL)]).astype(np.float32)
MIDDLES = (FINITE[1:] + FINITE[:-1]) / 2  # exact in float32
RNG = np.random.default_rng(0)

NUMBERS = {
    "float16's own": FINITE,
    "in the middle": MIDDLES,
    "just above it": np.nextafter(MIDDLES, np.float32(np.inf)),
    "just below it": np.nextafter(MIDDLES, np.float32(-np.inf)),
    "float32's subnormal": np.array([1e-40, -1e-40, 0.0, -0.0], np.float32),
    "weights": (0.02 * RNG.standard_normal(1 << 17)).astype(np.float32),
    "of all sizes": (10 ** RNG.uniform(-12, 4.8, 1 << 17) * RNG.choice([-1, 1], 1 << 17)).astype(np.float32),
    "around the largest": np.float32([65504, 65519.996, 65520, 65535, -65504, -65519.996, -65520, -65535]),
    "beyond it": np.float32([65536, -1e5, 1e38, np.inf, -np.inf, np.nan, 1.0, -0.0]),
}


def folded(numbers: NDArray, columns: int) -> NDArray:
    return np.resize(numbers, (-(-len(numbers) // columns), columns))


def same(a: NDArray, b: NDArray) -> bool:
    bits = f"u{b.itemsize}"
    equal = (a.view(bits) == b.view(bits)) | (np.isnan(a) & np.isnan(b))
    return a.dtype == b.dtype and a.shape == b.shape and bool(equal.all())


@pytest.mark.parametrize("which", ["all", "finite"])
@pytest.mark.parametrize("columns", [1, 4, 100])
def test_widening_is_exact(which: str, columns: int) -> None:
    numbers = folded(ALL if which == "all" else FINITE.astype(np.float16), columns)
    out = np.empty(numbers.shape, np.float32)
    widen(numbers, out)
    assert same(out, numbers.astype(np.float32))
    widen(np.asfortranarray(numbers), out)
    assert same(out, numbers.astype(np.float32))


@pytest.mark.filterwarnings("ignore:overflow")  # NumPy's, of what is expected
@pytest.mark.parametrize("case", NUMBERS)
@pytest.mark.parametrize("columns", [4, 64])
def test_narrowing_rounds_as_numpy_does(case: str, columns: int) -> None:
    numbers = folded(NUMBERS[case], columns)
    out = np.empty((len(numbers), 3 * columns), np.float16)[:, columns : 2 * columns]
    narrow(numbers.copy(), out)
    assert same(out.copy(), numbers.astype(np.float16))


@pytest.mark.parametrize("size", range(1, 70))
def test_every_length_is_converted_whole(size: int) -> None:
    """Vectors of the processor's width, and what is left of them."""
    numbers = NUMBERS["weights"][None, :size]
    narrowed, widened = np.zeros((2, 1, size + 1), np.float16), np.zeros((1, size + 1), np.float32)
    narrow(numbers, narrowed[0, :, :size])
    assert same(narrowed[0, :, :size], numbers.astype(np.float16))
    widen(narrowed[0, :, :size], widened[:, :size])
    assert same(widened[:, :size], narrowed[0, :, :size].astype(np.float32))
    assert narrowed[0, 0, size] == widened[0, size] == 0


def test_threads_do_not_get_into_each_others_way() -> None:
    def back_and_forth(seed: int) -> bool:
        numbers = np.random.default_rng(seed).standard_normal((300, 70), np.float32)
        halves, wide = np.empty((70, 300), np.float16).T, np.empty((300, 70), np.float32)
        narrow(numbers, halves)
        widen(halves, wide)
        return same(halves, numbers.astype(np.float16)) and same(wide, halves.astype(np.float32))

    with limited_to(4):
        assert all(spread(back_and_forth, range(40)))


def test_slices_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLICE", 100)
    numbers = folded(NUMBERS["weights"], 24)
    out = np.empty(numbers.T.shape, np.float16).T
    narrow(numbers.copy(), out)
    assert same(out, numbers.astype(np.float16))
    widened = np.empty(numbers.shape, np.float32)
    widen(out, widened)
    assert same(widened, out.astype(np.float32))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_nothing_is_converted(shape: tuple[int, int]) -> None:
    narrow(np.empty(shape, np.float32), np.empty(shape, np.float16))
    widen(np.empty(shape, np.float16), np.empty(shape, np.float32))
