"""Rounding block by block: in true order, with the statistics that belong to each Linear, to a better result."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lowbit_runs
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from stage_runs import decoder_stages, feeds_of, stage_rows

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.hessian import Statistics
from quarot_onnx.calibration.readers import SampleReader
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import GPTQConfig, RTNConfig
from quarot_onnx.config.spec import Int4Spec, Int8Spec, QLayerConfig, UInt8Spec
from quarot_onnx.errors import ModelError
from quarot_onnx.graph.query import seen
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.quantization import static_ranges
from quarot_onnx.quantization.select import select
from quarot_onnx.rounding import blockwise, lowbit
from quarot_onnx.rounding.checkpoint import Checkpoint
from quarot_onnx.rounding.methods import round_weight
from quarot_onnx.rounding.solve import Rounded
from quarot_onnx.rounding.store import RoundedWeight
from quarot_onnx.sites.detect import Survey

W4 = QLayerConfig(weight=Int4Spec())


@dataclass
class Call:
    """One call of a rounding method and its result."""

    name: str
    weight: NDArray[np.float64]
    statistics: Statistics | None
    arguments: tuple[Any, ...]
    result: Rounded


class Work:
    """All that rounding needs, from a file and a configuration."""

    memory = Memory()

    def __init__(self, source: Path, config: QConfig, folder: Path, samples: list[Feeds] | None = None) -> None:
        model = model_io.load(source)
        selection = select(Survey(model), config)
        self.samples = feeds_of(source, count=4, length=40) if samples is None else samples
        ranges = static_ranges.calibrate(selection, SampleReader(self.samples))
        self.task = lowbit.Task(selection, config, ranges, self.samples, source)
        self.checkpoint, self.scratch = Checkpoint(folder), folder / "scratch"
        self.scratch.mkdir(exist_ok=True)

    def round(self) -> tuple[dict[str, RoundedWeight], tuple[str, ...]]:
        return lowbit.round_weights(self.task, self.checkpoint, self.scratch, lambda *_: None, self.memory)

    def load(self) -> None:
        """Round all, those too that are when they are written."""
        written = lowbit.weights_of(self.task.config, self.round()[0])
        for job in self.task.selection.linears:
            written(job).load()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    found: list[Call] = []

    def spy(weight: Any, statistics: Any, *rest: Any, helpers: None) -> Rounded:
        result = round_weight(weight, statistics, *rest, helpers=helpers)
        found.append(Call(rest[-1], weight, statistics, rest, result))
        return result

    monkeypatch.setattr(blockwise, "round_weight", spy)
    return found


def weighted(error: NDArray[np.float64], matrix: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Tr(errorᵀ matrix other)."""
    return float((error * (matrix @ other)).sum())


def test_statistics_are_of_the_model_quantized_so_far(llama_optimum: Path, tmp_path: Path, calls: list[Call]) -> None:
    """Each Hessian is that of the graph whose earlier weights are the rounded ones, and whose others are not."""
    config = QConfig(W4, algo_config=[GPTQConfig()])
    work = Work(llama_optimum, config, tmp_path)
    given, _ = work.round()
    jobs = {job.name: job for job in work.task.jobs()}
    model = model_io.load(llama_optimum)
    aware = [call for call in calls if call.statistics is not None]
    assert [len(call.name.split(" + ")) for call in aware] == [3, 1, 2, 1] * 2
    for call, stage in zip(aware, decoder_stages(work.task.selection.survey.model), strict=True):
        names = call.name.split(" + ")
        assert names == [linear.name for linear in stage.linears]
        assert call.statistics is not None
        x = stage_rows(model, stage, work.samples)
        expected = x.T @ x / len(x)
        assert call.statistics.tokens == len(x)
        assert np.abs(call.statistics.hessian - expected).max() <= 1e-5 * np.abs(expected).max()
        for name in names:
            replace_weight(model, jobs[name], given[name].load().dequantized())


def replace_weight(model: ir.Model, job: blockwise.WeightJob, array: NDArray[np.float32]) -> None:
    value = model.graph.initializers[job.weight.value.name or ""]
    stored = array.T.copy() if job.weight.transposed else array
    value.const_value = ir.Tensor(stored, name=value.name)


@pytest.mark.parametrize("method", ["gptq", "gptaq", "qronos"])
def test_every_method_beats_rounding_to_nearest(
    method: str, llama_optimum: Path, tmp_path: Path, calls: list[Call]
) -> None:
    """In what it minimises: the error of each Linear's output on the calibration samples.

    ||XW - X̃Q||² / N = const + 2 tr(Wᵀ D E) + tr(Eᵀ H E), E = W - Q; GPTQ knows nothing of D.
    """
    work = Work(llama_optimum, lowbit_runs.config_for(method, "nbits"), tmp_path)
    work.round()
    better = []
    for call in calls:
        if call.statistics is None:
            continue
        nearest = round_weight(call.weight, None, call.arguments[0], RTNConfig(), call.name)
        errors = []
        for result in (call.result, nearest):
            difference = call.weight - result.weight.dequantized()
            error = weighted(difference, call.statistics.hessian, difference)
            if call.statistics.drift is not None:
                error += 2 * weighted(call.weight, call.statistics.drift, difference)
            errors.append(error)
        better.append(errors[1] - errors[0])
        assert (call.statistics.drift is None) == (method == "gptq")
    assert len(better) == 8
    # GPTAQ weighs the drift with a quarter; every other method must win at every Linear.
    assert all(gain > 0 for gain in better) or (method == "gptaq" and sum(better) > 0)


def test_rounded_together_or_apart(llama_optimum: Path, tmp_path: Path, calls: list[Call]) -> None:
    """Columns are problems of their own: q, k and v stacked are q, k and v."""
    work = Work(llama_optimum, QConfig(W4, algo_config=[GPTQConfig()]), tmp_path)
    given, _ = work.round()
    first = calls[0]
    for name in first.name.split(" + "):
        job = next(job for job in work.task.jobs() if job.name == name)
        alone = round_weight(job.read().astype(np.float64), first.statistics, *first.arguments[:-1], name).weight
        stored = given[name].load()
        # The same arithmetic in matrix products of another width: an integer in a thousand may fall differently.
        assert (alone.integers != stored.integers).mean() < 1e-3
        np.testing.assert_allclose(alone.scale, stored.scale, rtol=1e-6)
        assert stored.integers.flags.c_contiguous


def test_one_scale_for_a_matrix_is_found_for_each_matrix(
    llama_optimum: Path, tmp_path: Path, calls: list[Call]
) -> None:
    config = QConfig(QLayerConfig(weight=Int8Spec()), algo_config=[GPTQConfig()])
    given, _ = Work(llama_optimum, config, tmp_path).round()
    assert not any(" + " in call.name for call in calls)
    assert {weight.load().scale.shape for weight in given.values()} == {(1, 1)}
    assert len({weight.load().scale.item() for weight in given.values()}) == len(given)


def test_other_grids_in_a_stage_part_it_but_keep_its_order(
    llama_optimum: Path, tmp_path: Path, calls: list[Call]
) -> None:
    """K in 8 bits between Q and V in 4: each weight stays with its own node."""
    eight = QLayerConfig(weight=Int8Spec(quant_granularity="Channel"))
    config = QConfig(W4, {eight: ["*k_proj*"]}, algo_config=[GPTQConfig()])
    work = Work(llama_optimum, config, tmp_path)
    given, _ = work.round()
    assert ["k_proj" in call.name for call in calls[:3]] == [False, True, False]
    assert calls[0].statistics is calls[2].statistics
    for job in work.task.jobs()[:-1]:  # without the head
        weight = given[job.name].load()
        assert weight.scheme.bits == (8 if "k_proj" in job.name else 4)
        real = seen(job.weight, job.alpha)
        assert np.abs(weight.dequantized() - real).max() < np.abs(real).max()
        assert np.corrcoef(weight.dequantized().ravel(), real.ravel())[0, 1] > 0.9


def test_static_activations_keep_stages_whole(llama_optimum: Path, tmp_path: Path, calls: list[Call]) -> None:
    config = QConfig(
        QLayerConfig(UInt8Spec(), Int8Spec(quant_granularity="Channel")),
        algo_config=[GPTQConfig(enable_aq_calibration=True)],
    )
    Work(llama_optimum, config, tmp_path).round()
    assert [len(call.name.split(" + ")) for call in calls[:8]] == [3, 1, 2, 1] * 2


@pytest.mark.parametrize("asked", [False, True])
def test_activations_are_quantized_for_statistics_where_asked(
    asked: bool, llama_optimum: Path, tmp_path: Path, calls: list[Call]
) -> None:
    layer = lowbit_runs.LAYERS["fake"]
    config = QConfig(layer, algo_config=[GPTQConfig(enable_aq_calibration=asked)], output_format="fake")
    work = Work(llama_optimum, config, tmp_path)
    work.round()
    x = stage_rows(work.task.selection.survey.model, decoder_stages(work.task.selection.survey.model)[0], work.samples)
    assert calls[0].statistics is not None
    off = np.abs(calls[0].statistics.hessian - x.T @ x / len(x)).max() / np.abs(x.T @ x / len(x)).max()
    assert (off > 1e-3) == asked, off


def test_a_raised_damping_is_noted(llama_optimum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raised(*arguments: Any, helpers: None) -> Rounded:
        return replace(round_weight(*arguments, helpers=helpers), damping=0.5)

    monkeypatch.setattr(blockwise, "round_weight", raised)
    _, notes = Work(llama_optimum, QConfig(W4, algo_config=[GPTQConfig()]), tmp_path).round()
    assert len(notes) == 8
    assert "down_proj" in notes[3]
    assert "damping 0.01: 0.5 was used" in notes[3]


@pytest.mark.parametrize("method", ["gptq", "gptaq", "qronos"])
def test_fewer_tokens_than_columns(method: str, llama_optimum: Path, tmp_path: Path, calls: list[Call]) -> None:
    """The damping makes up for the rank: the result is still better than to nearest, and a note names the widest."""
    config = lowbit_runs.config_for(method, "nbits")
    _, notes = Work(llama_optimum, config, tmp_path, feeds_of(llama_optimum, count=1, length=127)).round()
    few = [note for note in notes if "tokens" in note]
    assert len(few) == 1
    assert few[0].startswith("127 calibration tokens are fewer than the 128 columns of ")
    assert "o_proj" in few[0]
    assert f"damping of {0.01 if method == 'gptq' else 0.1:g}" in few[0]
    assert "--calib-samples" in few[0]
    assert not any("could not be factorised" in note for note in notes)
    for call in calls:
        assert call.statistics is not None
        assert call.statistics.tokens == 127
        nearest = round_weight(call.weight, None, call.arguments[0], RTNConfig(), call.name)
        ours, theirs = (call.weight - found.weight.dequantized() for found in (call.result, nearest))
        if method == "gptq":
            assert weighted(ours, call.statistics.hessian, ours) < weighted(theirs, call.statistics.hessian, theirs)
    (tmp_path / "enough").mkdir()
    enough = Work(llama_optimum, config, tmp_path / "enough", feeds_of(llama_optimum, count=1, length=128))
    assert not any("tokens" in note for note in enough.round()[1])


def test_hidden_states_keep_to_the_memory_there_is(llama_optimum: Path, tmp_path: Path) -> None:
    """What does not fit lies on disk, and changes nothing."""
    found = []
    for memory in (Memory(), Memory(limit=1 << 10)):
        work = Work(llama_optimum, lowbit_runs.config_for("gptaq", "nbits"), tmp_path)
        work.checkpoint.remove()
        work.checkpoint = Checkpoint(tmp_path)
        work.memory = memory
        found.append({name: weight.load().integers for name, weight in work.round()[0].items()})
        assert (work.scratch / "quantized").exists() is (work.scratch / "float").exists() is (memory.limit is not None)
    assert all((found[0][name] == found[1][name]).all() for name in found[0])


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_nan_in_a_weight(method: str, llama_optimum: Path, tmp_path: Path) -> None:
    model = model_io.load(llama_optimum)
    job = Work(llama_optimum, QConfig(W4), tmp_path).task.jobs()[-2]
    array = seen(job.weight).copy()
    array[3, 5] = np.nan
    replace_weight(model, job, array)
    (tmp_path / "bad").mkdir()
    bad = model_io.save(model, tmp_path / "bad" / "m.onnx").path
    work = Work(bad, lowbit_runs.config_for(method, "nbits"), tmp_path, feeds_of(bad, count=4, length=40))
    with pytest.raises(ModelError, match=r"down_proj.*holds NaN or infinity"):
        work.load()
