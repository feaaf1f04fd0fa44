"""Columns of weights that workers round: the bits of this process alone, and nothing left on storage."""

from pathlib import Path
from typing import Any

import exports
import ml_dtypes
import numpy as np
import pytest
from distributed import Client
from lowbit_runs import config_for, text_reader

from quarot_onnx.calibration.hessian import Accumulator, Statistics
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.config.rounding import GPTAQConfig, GPTQConfig, HessianConfig, QronosConfig
from quarot_onnx.distributed.cluster import Cluster
from quarot_onnx.errors import ModelError
from quarot_onnx.pipeline import quantize
from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.rounding import elsewhere, solve
from quarot_onnx.rounding.elsewhere import Workers, pays
from quarot_onnx.rounding.methods import round_weight

pytestmark = [pytest.mark.xdist_group("cluster")]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several for every weight, all of which are given away."""
    monkeypatch.setattr(solve, "_TILE", 20)
    monkeypatch.setattr(elsewhere, "pays", lambda *_: True)


def statistics(rng: np.random.Generator, features: int) -> Statistics:
    moved = rng.standard_normal((200, features)) @ rng.standard_normal((features, features))
    sums = Accumulator(features, drift=True)
    sums.add(moved.astype(np.float32), (moved + 0.1 * rng.standard_normal(moved.shape)).astype(np.float32))
    return sums.finish()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        (GPTQConfig(act_order=True), WeightScheme(4)),
        (GPTAQConfig(), WeightScheme(4, symmetric=False)),
        (QronosConfig(), WeightScheme(4)),
        (QronosConfig(act_order=True, static_groups=True), WeightScheme(3, group_size=16)),
        (QronosConfig(), WeightScheme(4, group_size=16)),
        (QronosConfig(mse=False), WeightScheme(8)),
    ],
    ids=repr,
)
def test_the_same_bits(
    options: HessianConfig, scheme: WeightScheme, dtype: Any, client: Client, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    weight, found = rng.standard_normal((48, 70)).astype(dtype), statistics(rng, 48)
    here = round_weight(weight, found, scheme, options, "w")
    there = round_weight(weight, found, scheme, options, "w", helpers=Workers(Cluster(client), tmp_path))
    assert there.damping == here.damping
    for name in ("integers", "scale", "zero_point"):
        np.testing.assert_array_equal(getattr(there.weight, name), getattr(here.weight, name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("method", "form"), [("qronos", "w4a8"), ("gptaq", "fake"), ("gptq", "w4a8")])
def test_the_same_bytes(method: str, form: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, written, calls = exports.genai_like(layers=2), [], []
    rounded = Workers.rounded

    def counted(self: Workers, *arguments: Any) -> Any:
        calls.append(len(arguments[2]))
        return rounded(self, *arguments)

    monkeypatch.setattr(Workers, "rounded", counted)
    for scheduler in (None, address):
        config = config_for(method, form, quarot=QuarotConfig())
        target = tmp_path / f"{scheduler is None}" / "q.onnx"
        quantize(model, target, config, text_reader(model, 4, 32), verify=False, check=None, scheduler=scheduler)
        written.append({path.name: path.read_bytes() for path in target.parent.iterdir()})
    assert written[0] == written[1]
    assert len(calls) == 8, "q, k and v; o; gate and up; down: of two layers"
    assert min(calls) > 1


def test_one_scale_for_a_whole_weight_stays_here(client: Client, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scheme, weight, found = WeightScheme(4, per_channel=False), rng.standard_normal((48, 70)), statistics(rng, 48)
    here = round_weight(weight, found, scheme, QronosConfig(), "w")
    there = round_weight(weight, found, scheme, QronosConfig(), "w", helpers=Workers(Cluster(client), tmp_path))
    np.testing.assert_array_equal(there.weight.integers, here.weight.integers)


def test_what_a_worker_finds_is_told(client: Client, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight, found = rng.standard_normal((48, 70)), statistics(rng, 48)
    weight[3, 60] = np.nan
    with pytest.raises(ModelError, match="the weight of 'w' holds NaN or infinity"):
        round_weight(weight, found, WeightScheme(4), GPTQConfig(), "w", helpers=Workers(Cluster(client), tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shape", "tiles", "theirs", "ours", "gives"),
    [
        ((576, 960), 2, 128, 2, False),  # it is done before it is written
        ((4096, 22016), 29, 128, 8, True),
        ((4096, 22016), 29, 8, 8, False),
        ((11008, 4096), 6, 128, 8, False),  # as many threads here as there are tiles
        ((11008, 4096), 6, 128, 2, True),
    ],
)
def test_what_is_given_away(shape: tuple[int, int], tiles: int, theirs: int, ours: int, gives: bool) -> None:
    assert pays(shape, 2, tiles, theirs, ours) is gives
