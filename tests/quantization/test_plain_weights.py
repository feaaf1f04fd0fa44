"""Weights rounded to nearest when they are written: read as seldom as can be, and the same whoever reads them."""

from pathlib import Path
from typing import Any

import lowbit_runs
import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.emission.packing import pack, packed_columns, unsigned
from quarot_onnx.graph.query import Constant
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import quantize
from quarot_onnx.quantization.grids import Grid
from quarot_onnx.quantization.scheme import QuantizedWeight, WeightScheme
from quarot_onnx.rounding import plain, rtn
from quarot_onnx.rounding.blockwise import WeightJob
from quarot_onnx.rounding.grids import find_grid
from quarot_onnx.rounding.plain import PlainWeights
from quarot_onnx.rounding.rtn import nearest_integers, round_to_nearest_weight

CHANNEL, GROUPS = WeightScheme(4), WeightScheme(4, group_size=32, symmetric=False, signed=False)


class Counted:
    """A weight that counts how often it is read."""

    def __init__(self, scheme: WeightScheme, seed: int = 0, dtype: Any = np.float16) -> None:
        self.weight = np.random.default_rng(seed).standard_normal((96, 40)).astype(dtype)
        self.reads = 0
        kind = ir.DataType.from_numpy(self.weight.dtype)
        tensor = model_io.lazy_tensor(self.read, dtype=kind, shape=self.weight.shape, name="w")
        self.job = WeightJob("w", Constant(ir.Value(name="w"), tensor, transposed=False, dtype=kind), scheme)

    def read(self) -> Any:
        self.reads += 1
        return self.weight


@pytest.mark.parametrize("scheme", [CHANNEL, GROUPS])
@pytest.mark.parametrize("clip", [False, True])
def test_integers_and_grid_from_one_reading(scheme: WeightScheme, *, clip: bool) -> None:
    given = Counted(scheme)
    rounded = PlainWeights(clip=clip).rounded(given.job)
    assert given.reads == 0
    found, grid = rounded.load(), rounded.grid()
    assert given.reads == 1
    expected = round_to_nearest_weight(given.weight, scheme, "w", clip=clip)
    assert (found.integers == expected.integers).all()
    assert (grid.scale == expected.scale).all()
    assert (grid.zero_point == expected.zero_point).all()


@pytest.mark.parametrize(
    "scheme", [CHANNEL, GROUPS, WeightScheme(4, group_size=32), WeightScheme(8, per_channel=False)]
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("clip", [False, True])
def test_what_is_read_is_left_as_it_is(scheme: WeightScheme, dtype: Any, *, clip: bool) -> None:
    """A lazy tensor's array is not copied."""
    given = Counted(scheme, dtype=dtype)
    given.weight.setflags(write=False)
    weight = PlainWeights(clip=clip).rounded(given.job)
    assert weight.load().integers.shape == given.weight.shape


def test_large_grids_are_kept_until_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_SMALL", 4 * 40)
    weights = PlainWeights(clip=False)
    small, first, second = Counted(CHANNEL), Counted(GROUPS, 1), Counted(GROUPS, 2)
    rounded = [weights.rounded(given.job) for given in (small, first, second)]
    grids = [weight.grid() for weight in rounded]
    assert [given.reads for given in (small, first, second)] == [1, 1, 1]
    again = [weight.grid() for weight in rounded]  # of the first, which the second drove out
    assert [given.reads for given in (small, first, second)] == [1, 2, 2]
    assert all((a.scale == b.scale).all() for a, b in zip(grids, again, strict=True))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scheme", [CHANNEL, GROUPS, WeightScheme(8, per_channel=False)])
@pytest.mark.parametrize("transposed", [False, True])
def test_16_bit_weights_as_in_float64(scheme: WeightScheme, dtype: Any, *, transposed: bool) -> None:
    """Whatever the parts that they are worked on in: more than a part has rows and columns."""
    weight = (np.random.default_rng(3).standard_normal((1100, 300)) / 30).astype(dtype)
    weight = weight if transposed else np.ascontiguousarray(weight.T)
    given = weight.T if transposed else weight
    found = round_to_nearest_weight(given, scheme, "w", clip=True)
    expected = round_to_nearest_weight(given.astype(np.float64), scheme, "w", clip=True)
    assert (found.scale == expected.scale).all()
    assert (found.integers == expected.integers).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("power", [-120, 0, 100])
@pytest.mark.parametrize("chunk", [1, 4700, 1 << 15])
def test_nearest_as_in_float64(dtype: Any, bits: int, power: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle between integers, too, a rounding beside it, and where float32 has no reciprocal of the scale."""
    monkeypatch.setattr(rtn, "_CHUNK", chunk)
    if dtype == np.float16 and power:
        power = -6
    scheme, rng = WeightScheme(bits, symmetric=False), np.random.default_rng(0)
    scale = (rng.uniform(1, 2, (1, 400)) * 2.0**power).astype(np.float32)
    middle = rng.integers(scheme.low, scheme.high, (64, 400)) + 0.5 * rng.integers(0, 2, (64, 400))
    weight = (middle * scale.astype(np.float64)).astype(dtype)
    away = rng.integers(-1, 2, weight.shape)
    weight = np.where(away, np.nextafter(weight, np.where(away > 0, np.inf, -np.inf).astype(dtype)), weight)
    zero = rng.integers(scheme.low, scheme.high, scale.shape).astype(np.int8)
    steps, whole = weight.astype(np.float64) / scale, zero.astype(np.float64)
    expected = np.clip(np.rint(steps), scheme.low - whole, scheme.high - whole) + whole
    assert (nearest_integers(weight, scheme, Grid(scale, zero)) == expected).all()
    if dtype != np.float16:
        assert (np.abs(steps - np.floor(steps) - 0.5) < rtn._NEAR * 2**bits).sum() > 5000


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("scheme", [GROUPS, WeightScheme(4, group_size=128), WeightScheme(3, group_size=600)])
def test_range_search_and_rounding_of_a_part_are_those_of_the_whole(
    scheme: WeightScheme, monkeypatch: pytest.MonkeyPatch, *, clip: bool
) -> None:
    weight = np.random.default_rng(0).standard_normal((1000, 700)).astype(np.float16)
    grid = find_grid(weight, scheme, "w", clip=clip)
    integers = nearest_integers(weight, scheme, grid)
    for tile in (1 << 16, 1 << 13, 1):
        monkeypatch.setattr(rtn, "_TILE", tile)
        found = round_to_nearest_weight(weight[:, : 700 if tile > 1 else 5], scheme, "w", clip=clip)
        width = found.integers.shape[1]
        assert (found.integers == integers[:, :width]).all()
        assert (found.scale == grid.scale[:, :width]).all()
        assert (found.zero_point == grid.zero_point[:, :width]).all()


@pytest.mark.parametrize(("features", "block"), [(96, 32), (700, 128), (20, 16), (1, 16)])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_packed_as_by_hand(features: int, block: int, bits: int, *, per_channel: bool) -> None:
    scheme = WeightScheme(bits, symmetric=False, per_channel=per_channel)
    rng = np.random.default_rng(0)
    grids = (1, 600 if per_channel else 1)
    weight = QuantizedWeight(
        scheme,
        rng.integers(scheme.low, scheme.high + 1, (features, 600)).astype(np.int8),
        np.ones(grids, np.float32),
        rng.integers(scheme.low, scheme.high + 1, grids).astype(np.int8),
    )
    blocks = -(-features // block)
    rows = np.empty((600, blocks * block), np.uint8)
    rows[:, :features] = unsigned(weight.integers, scheme, bits).T
    rows[:, features:] = unsigned(weight.zero_point[-1], scheme, bits)[:, None]
    found = packed_columns(weight, block, bits)
    assert found.shape == (600, blocks, block * bits // 8)
    assert (found == pack(rows.reshape(600, blocks, block), bits)).all()


def test_a_rotated_model_that_nothing_runs_is_not_written(
    llama_optimum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is written is what it would be."""
    written, save = list[str](), model_io.save

    def saved(model: ir.Model, path: Any, **options: Any) -> Any:
        written.append(Path(path).name)
        return save(model, path, **options)

    monkeypatch.setattr(model_io, "save", saved)
    config = lowbit_runs.config_for("rtn", "w4a8", quarot=QuarotConfig())
    outputs = []
    for verify in (False, True):
        quantize(llama_optimum, tmp_path / "q.onnx", config, verify=verify, check=None)
        outputs.append((tmp_path / "q.onnx").read_bytes())
    assert written == ["q.onnx", "rotate.onnx", "q.onnx"]
    assert outputs[0] == outputs[1]
