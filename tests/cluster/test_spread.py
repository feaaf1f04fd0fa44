"""Statistics, rounding and perplexity with a cluster's workers: the bytes and figures of one machine alone."""

import os
import signal
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny_decoders as tiny
import worker_tasks
from distributed import Client
from lowbit_runs import config_for, text_reader
from stage_runs import decoder_stages, feeds_of, plain_stages

from quarot_onnx.calibration import units
from quarot_onnx.calibration.elsewhere import Elsewhere, Shared
from quarot_onnx.calibration.hessian import Accumulator
from quarot_onnx.calibration.ranges import RangeRule, collect_ranges
from quarot_onnx.calibration.readers import SampleReader
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.config.enums import CalibMethod
from quarot_onnx.config.spec import Int8Spec, QLayerConfig, UInt8Spec
from quarot_onnx.distributed.cluster import Cluster
from quarot_onnx.errors import CalibrationError
from quarot_onnx.evaluation.perplexity import perplexity
from quarot_onnx.graph.linear import linears
from quarot_onnx.graph.query import seen
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.pipeline import Outcome, quantize
from quarot_onnx.quantization.activations import per_token
from quarot_onnx.quantizer import ModelQuantizer
from quarot_onnx.stages import spread
from quarot_onnx.stages.blocks import Stage
from quarot_onnx.stages.passing import Replacement
from quarot_onnx.stages.runner import StageRunner
from quarot_onnx.stages.spread import SpreadRunner

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.further]

SAMPLES, LENGTH = 7, 64


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples a unit: four units, the last one smaller."""
    monkeypatch.setattr(units, "ROWS", 2 * LENGTH + 10)


def run(source: Path, folder: Path, method: str, form: str, **options: Any) -> Outcome:
    config = config_for(method, form, quarot=QuarotConfig(), use_external_data_format=True)
    reader = options.pop("reader", None) or text_reader(source, SAMPLES, LENGTH)
    return quantize(source, folder / "q.onnx", config, reader, verify=False, check=None, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def two_products(folder: Path, width: int) -> tuple[Path, ir.Model]:
    """A graph of two Linears with a Relu between them, which takes floats."""
    make, rng = onnx.helper.make_node, np.random.default_rng(1)
    nodes = [
        make("MatMul", ["x", "A"], ["a"], name="a"),
        make("Relu", ["a"], ["r"]),
        make("MatMul", ["r", "B"], ["y"], name="b"),
    ]
    arrays = {name: rng.standard_normal((width, width)).astype(np.float32) / 8 for name in "AB"}
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    ends = [onnx.helper.make_tensor_value_info(name, 1, [1, "s", width]) for name in ("x", "y")]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    path = folder / "m.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path, model_io.load(path)


def before_of(number: int, stages: tuple[Stage, ...]) -> Replacement | None:
    """Rounded weights of the stage before."""
    if number == 0:
        return None
    weights = tuple(np.round(seen(linear.weight) * 24) / np.float32(24) for linear in stages[number - 1].linears)
    return Replacement(partial(worker_tasks.given, weights), per_token)


SOURCES: dict[str, Callable[[], Path]] = {
    "genai": lambda: exports.genai_like(layers=3),
    "optimum": lambda: exports.optimum_export("llama"),
    "float16": lambda: exports.genai_like(dtype="fp16"),
}


@pytest.mark.parametrize(
    ("source", "method", "form"),
    [
        ("genai", "qronos", "w4a8"),
        ("optimum", "gptaq", "fake"),
        ("float16", "gptaq", "w4a8"),
    ],
)
def test_the_same_bytes(source: str, method: str, form: str, address: str, tmp_path: Path) -> None:
    model = SOURCES[source]()
    here = run(model, tmp_path / "here", method, form)
    there = run(model, tmp_path / "there", method, form, scheduler=address)
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert here.notes == there.notes
    assert here.recipe == there.recipe


def test_the_same_bytes_where_workers_sum(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panel by panel, as for many units or wide ones."""
    model = SOURCES["optimum"]()
    run(model, tmp_path / "here", "qronos", "fake")
    monkeypatch.setattr(spread, "by_panels", lambda *_, **__: True)
    monkeypatch.setattr(Accumulator, "add_panels", counted := Counting(Accumulator.add_panels))
    run(model, tmp_path / "there", "qronos", "fake", scheduler=address)
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert counted.calls == 8, "once for each stage, as these models have one panel"


class Counting:
    """A method that counts its calls."""

    def __init__(self, method: Callable[..., None]) -> None:
        self.calls, self._method = 0, method

    def __get__(self, owner: object, _kind: type) -> Callable[..., None]:
        self.calls += 1
        return partial(self._method, owner)


@pytest.mark.parametrize("drift", [False, True])
def test_panels_of_several_tasks(drift: bool, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them for two threads."""
    monkeypatch.setattr(spread, "by_panels", lambda *_, **__: True)
    path, model = two_products(tmp_path, 800)
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((1, 60, 800)).astype(np.float32)} for _ in range(5)]
    stages = plain_stages(model)
    here = StageRunner(model, stages, samples, follow_float=drift, scratch=tmp_path / "here", limit=1 << 30)
    there = SpreadRunner(Cluster(client), path, model, stages, samples, follow_float=drift, scratch=tmp_path / "there")
    assert there._panels(800) == [(0, 2), (1,)]
    for number in range(2):
        a, b = (runner.statistics(number, before_of(number, stages), per_token) for runner in (here, there))
        assert a.tokens == b.tokens == 300
        assert a.hessian.tobytes() == b.hessian.tobytes()
        assert (a.drift is None) == (b.drift is None) == (not drift)
        assert a.drift is None or b.drift is None or a.drift.tobytes() == b.drift.tobytes()


def test_who_sums() -> None:
    """Units where they are few and narrow, panels where they are many and wide."""
    assert not spread.by_panels(576, 3, follow_float=False, threads=2)
    assert not spread.by_panels(1536, 3, follow_float=True, threads=2)
    assert spread.by_panels(28672, 128, follow_float=False, threads=64)
    assert spread.by_panels(28672, 128, follow_float=True, threads=64)
    assert not spread.by_panels(4096, 128, follow_float=False, threads=256), "eleven panels for 256 threads"


def test_the_same_bytes_of_padded_batches(address: str, tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    samples = []
    for seed in range(5):
        (feeds,) = feeds_of(source, count=1, length=60, seed=seed)
        batch = {name: np.repeat(array, 2, axis=0) for name, array in feeds.items()}
        batch["attention_mask"][1, : 20 + seed] = 0
        samples.append(batch)
    for folder, scheduler in (("here", None), ("there", address)):
        run(source, tmp_path / folder, "gptaq", "w4a8", reader=SampleReader(samples), scheduler=scheduler)
    assert files(tmp_path / "here") == files(tmp_path / "there")


def test_a_worker_that_is_killed_is_done_without(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One between two stages, and one that has written all that its unit leaves."""
    source, killed = exports.genai_like(layers=3), list[int]()
    run(source, tmp_path / "here", "gptaq", "w4a8")
    before = set(client.run(os.getpid).values())

    def progress(phase: str, done: int, _total: int | None) -> None:
        if (phase, done) == ("round", 2):
            killed.append(min(before))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(spread, "take_unit", worker_tasks.take_unit_or_die)
    run(source, tmp_path / "there", "gptaq", "w4a8", scheduler=client, progress=progress)
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert (tmp_path / "killed").exists()
    client.wait_for_workers(2, timeout=180)
    assert not set(killed) & set(client.run(os.getpid).values())
    assert client.status == "running", "it was given, and stays open"


class StoppedError(Exception):
    """What stops a run from outside."""


@pytest.mark.parametrize("first", ["here", "there"])
def test_stopped_it_goes_on_with_or_without_workers(first: str, address: str, tmp_path: Path) -> None:
    source, order = exports.genai_like(layers=3), {"here": None, "there": address}

    def progress(phase: str, done: int, _total: int | None) -> None:
        if (phase, done) == ("round", 12):
            raise StoppedError

    run(source, tmp_path / "whole", "gptaq", "w4a8")
    with pytest.raises(StoppedError) as raised:
        run(source, tmp_path / "q", "gptaq", "w4a8", scheduler=order.pop(first), progress=progress)
    assert "goes on from there" in raised.value.__notes__[0]
    (second,) = order.values()
    counts = list[int]()
    run(
        source, tmp_path / "q", "gptaq", "w4a8", scheduler=second, progress=lambda phase, done, _: counts.append(done)
        if phase == "round" else None,
    )  # fmt: skip
    assert counts[:10] == list(range(1, 11)), "two blocks are found"
    assert files(tmp_path / "whole") == files(tmp_path / "q")


def test_hidden_states_go_when_nobody_needs_them(client: Client, tmp_path: Path) -> None:
    """And not before: the statistics are those of a runner that has everything in memory, to the last bit."""
    source = exports.genai_like(layers=3)
    model, samples = model_io.load(source), feeds_of(source, count=SAMPLES, length=40)
    stages = decoder_stages(model)
    here = StageRunner(model, stages, samples, follow_float=True, scratch=tmp_path / "here", limit=1 << 30)
    there = SpreadRunner(Cluster(client), source, model, stages, samples, follow_float=True, scratch=tmp_path / "there")
    folders = sorted((tmp_path / "there" / "units").iterdir())
    assert len(folders) == 3
    counts = []
    for number in range(len(stages)):
        before = None
        if number:
            before = Replacement(partial(worker_tasks.coarse_weights, source, number - 1), per_token)
        a, b = (runner.statistics(number, before, per_token) for runner in (here, there))
        assert a.tokens == b.tokens
        assert a.hessian.tobytes() == b.hessian.tobytes()
        assert a.drift is not None
        assert b.drift is not None
        assert a.drift.tobytes() == b.drift.tobytes()
        left = [{path.name for path in folder.iterdir()} for folder in folders]
        assert left[0] == left[1] == left[2]
        counts.append(len(left[0]))
    # On each path the last input of a stage, the residual stream behind it, and what segment 0 left for all blocks.
    assert max(counts) <= 1 + 2 * 3
    assert counts[-1] == 1 + 2


def test_nan_names_the_sample(address: str, tmp_path: Path) -> None:
    """An error of a task is that of a run without workers, and nothing is left."""
    path, model = two_products(tmp_path, 8)
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((1, 30, 8)).astype(np.float32)} for _ in range(6)]
    samples[5]["x"][0, 3, 2] = np.inf
    with Client(address, set_as_default=False) as client:
        runner = SpreadRunner(
            Cluster(client), path, model, plain_stages(model), samples, follow_float=True, scratch=tmp_path / "s"
        )
        with pytest.raises(CalibrationError, match=r"activation 'x' holds NaN or infinity in sample 5"):
            runner.statistics(0, None, None)


@pytest.mark.parametrize(
    "options", [{}, {"memory": Memory(by_stages=True)}, {"decode": 3}], ids=["", "pieces", "decode"]
)
def test_the_same_perplexity(options: dict[str, Any], address: str, tmp_path: Path) -> None:
    path = tiny.save(tiny.build(tiny.Spec(cache="decode" in options)), tmp_path)
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    ids = np.random.default_rng(0).integers(2, tiny.VOCAB, 2200)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in ids))
    seen: list[tuple[int, int]] = []
    here = perplexity(path, text, path.parent, seq_len=60, windows=0, **options)
    there = perplexity(
        path,
        text,
        path.parent,
        seq_len=60,
        windows=0,
        scheduler=address,
        progress=lambda *now: seen.append(now),
        **options,
    )
    assert (here.nll, here.tokens, here.windows) == (there.nll, there.tokens, there.windows)
    assert seen[-1] == (here.windows, here.windows)
    assert len(seen) > 1


@pytest.mark.parametrize(("how", "by_stages"), [("MinMax", False), ("Percentile", True)])
def test_the_same_ranges(how: str, by_stages: bool, address: str, tmp_path: Path) -> None:
    """Decode steps among them."""
    source = exports.optimum_export("llama")
    layer = QLayerConfig(UInt8Spec(calibration_method=how), Int8Spec())
    phases = list[tuple[str, int, int | None]]()
    for folder, scheduler in (("here", None), ("there", address)):
        quantize(
            source, tmp_path / folder / "q.onnx", QConfig(layer), text_reader(source, 5, 40, decode_steps=2),
            verify=False, check=None, memory=Memory(by_stages=by_stages), scheduler=scheduler,
            progress=lambda *now, there=scheduler: phases.append(now) if there else None,
        )  # fmt: skip
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert ("calibrate", 5, 5) in phases


def test_ranges_are_put_together_in_any_number_of_groups(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exports.optimum_export("llama")
    samples = feeds_of(source, count=9)
    names = [linear.input.name or "" for linear in linears(model_io.load(source).graph)][:5]
    rule = RangeRule(CalibMethod.Percentile, 99)
    expected = collect_ranges(source, names, SampleReader(samples), rule=rule)
    shared = Shared(source, source.parent, 0, Memory())
    for groups in (3, 9):  # the second is more than are sent before any comes back
        counts = chain([groups], repeat(1))
        monkeypatch.setattr(Cluster, "threads", property(lambda _, counts=counts: next(counts)))
        elsewhere = Elsewhere(Cluster(client), shared, tmp_path)
        assert collect_ranges(source, names, SampleReader(samples), rule=rule, elsewhere=elsewhere) == expected


def test_ranges_tell_which_sample_is_at_fault(client: Client, tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    samples = feeds_of(source, count=5)
    samples[3]["input_ids"][0, 2] = -1
    (name,) = [linear.input.name for linear in linears(model_io.load(source).graph)][:1]
    elsewhere = Elsewhere(Cluster(client), Shared(source, source.parent, 0, Memory()), tmp_path)
    said = []
    for where in (None, elsewhere):
        with pytest.raises(CalibrationError) as raised:
            collect_ranges(source, [name or ""], SampleReader(samples), elsewhere=where)
        said.append(str(raised.value))
    assert said[0] == said[1]
    assert "SampleReader gives the token id -1 in sample 3" in said[0]


def test_auto_draws_its_rows_here(address: str, tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    config = QConfig(QLayerConfig(UInt8Spec(calibration_method="Auto"), Int8Spec()))
    reader = text_reader(source, 2, 24)
    done = quantize(source, tmp_path / "q.onnx", config, reader, verify=False, check=None, scheduler=address)
    assert any("nothing is calibrated that workers can help with" in note for note in done.notes)


def test_by_amd_quarks_names(address: str, tmp_path: Path) -> None:
    source = exports.genai_like(layers=3)
    config = config_for("gptq", "nbits")
    for folder, scheduler in (("here", None), ("there", address)):
        reader = text_reader(source, SAMPLES, LENGTH)
        quantizer = ModelQuantizer(config)
        quantizer.quantize_model(source, tmp_path / folder / "q.onnx", reader, check=None, scheduler=scheduler)
    assert files(tmp_path / "here") == files(tmp_path / "there")
