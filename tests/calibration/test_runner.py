"""The stage runner: both paths, their statistics, and going on in another process."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import exports
import hand_decoder
import linear_graphs as graphs
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from stage_runs import decoder_stages, feeds_of, plain_stages, rows_of, stage_rows, whole_runs

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.hessian import Statistics
from quarot_onnx.errors import CalibrationError
from quarot_onnx.graph.query import seen
from quarot_onnx.io import model_io
from quarot_onnx.quantization.activations import per_token
from quarot_onnx.stages.blocks import Stage
from quarot_onnx.stages.runner import Fake, Replacement, StageRunner

Weights = Callable[[Stage], tuple[NDArray[np.float32], ...]]


def identity(stage: Stage) -> tuple[NDArray[np.float32], ...]:
    """What the model has."""
    return tuple(seen(linear.weight, linear.alpha).astype(np.float32) for linear in stage.linears)


def coarse(stage: Stage) -> tuple[NDArray[np.float32], ...]:
    """Weights on a grid of some 4 bits."""
    return tuple((np.round(w * 24) / 24).astype(np.float32) for w in identity(stage))


class Run:
    """A runner with what it was made of."""

    def __init__(
        self,
        model: ir.Model,
        samples: list[Feeds],
        scratch: Path,
        *,
        drift: bool = True,
        limit: int = 1 << 30,
        weights: Weights = identity,
        fake: Fake | None = None,
        stages: tuple[Stage, ...] | None = None,
    ) -> None:
        self.stages = decoder_stages(model) if stages is None else stages
        self.weights, self.fake = weights, fake
        self.runner = StageRunner(model, self.stages, samples, follow_float=drift, scratch=scratch, limit=limit)

    def take(self, start: int = 0, stop: int | None = None) -> list[Statistics]:
        """The statistics of some stages."""
        found = []
        for number in range(start, len(self.stages) if stop is None else stop):
            before = Replacement(partial(self.weights, self.stages[number - 1]), self.fake) if number else None
            found.append(self.runner.statistics(number, before, self.fake))
        return found


def same_bits(first: list[Statistics], second: list[Statistics]) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.tokens == b.tokens
        assert a.hessian.tobytes() == b.hessian.tobytes()
        assert (a.drift is None) == (b.drift is None)
        assert a.drift is None or b.drift is None or a.drift.tobytes() == b.drift.tobytes()


@pytest.fixture
def llama(llama_optimum: Path) -> tuple[ir.Model, list[Feeds]]:
    return model_io.load(llama_optimum), feeds_of(llama_optimum, count=3)


EXPORTS: dict[str, Callable[[], Path]] = {
    "optimum": lambda: exports.optimum_export("llama"),
    "optimum phi3": lambda: exports.optimum_export("phi3"),
    "dynamo with cache": lambda: exports.dynamo_export("llama", with_cache=True),
    "genai": exports.genai_like,
    "genai float16": lambda: exports.genai_like(dtype="fp16"),
    "opset 23": exports.opset23_module_export,
}


@pytest.mark.parametrize("export", EXPORTS)
def test_unchanged_weights_make_no_drift(export: str, tmp_path: Path) -> None:
    """D is zero to the last bit: both paths compute the same. H is that of the whole model run at once."""
    path = EXPORTS[export]()
    model, samples = model_io.load(path), feeds_of(path)
    run = Run(model, samples, tmp_path)
    found = run.take()
    names = [stage.input.name or "" for stage in run.stages]
    whole = whole_runs(model, names, samples)
    for stage, name, statistics in zip(run.stages, names, found, strict=True):
        x = np.concatenate([rows_of(arrays[name], stage.linears[0]) for arrays in whole])
        assert statistics.tokens == len(x) == sum(feeds["input_ids"].size for feeds in samples)
        assert statistics.drift is not None
        assert not statistics.drift.any()
        expected = x.T @ x / len(x)
        # Sums of 27 products of float32 values that were themselves summed in another order; of float16 ones.
        tolerance = 2e-2 if "float16" in export else 1e-5
        assert np.abs(statistics.hessian - expected).max() <= tolerance * np.abs(expected).max()
        np.testing.assert_array_equal(statistics.hessian, statistics.hessian.T)


def test_the_quantized_path_is_the_model_with_other_weights(
    llama: tuple[ir.Model, list[Feeds]], tmp_path: Path
) -> None:
    """Against the graph in which the weights really are replaced; and the float path stays what it was."""
    model, samples = llama
    run = Run(model, samples, tmp_path / "a", weights=coarse)
    found = run.take()
    changed = model.clone()
    for stage, given in ((stage, coarse(stage)) for stage in run.stages):
        for linear, weight in zip(stage.linears, given, strict=True):
            value = changed.graph.initializers[linear.weight.value.name or ""]
            value.const_value = ir.Tensor(weight.T.copy() if linear.weight.transposed else weight, name=value.name)
    names = [stage.input.name or "" for stage in run.stages]
    runs = [whole_runs(m, names, samples) for m in (changed, model)]
    for stage, name, statistics in zip(run.stages, names, found, strict=True):
        quantized, exact = (
            np.concatenate([rows_of(arrays[name], stage.linears[0]) for arrays in outputs]) for outputs in runs
        )
        hessian, drift = quantized.T @ quantized / len(exact), (exact - quantized).T @ quantized / len(exact)
        assert statistics.drift is not None
        assert np.abs(statistics.hessian - hessian).max() <= 1e-5 * np.abs(hessian).max()
        # D is a difference: its errors are those of H, whatever its own size.
        assert np.abs(statistics.drift - drift).max() <= 1e-5 * np.abs(hessian).max()
    assert [statistics.drift is not None and statistics.drift.any() for statistics in found] == [False] + [True] * 7


def test_activations_are_quantized_where_asked(llama: tuple[ir.Model, list[Feeds]], tmp_path: Path) -> None:
    """The first stage's own statistics are of quantized inputs; later ones also come from quantized inputs."""
    model, samples = llama
    plain, faked = Run(model, samples, tmp_path / "a"), Run(model, samples, tmp_path / "b", fake=per_token)
    x = per_token(stage_rows(model, plain.stages[0], samples).astype(np.float32)).astype(np.float64)
    first, exact = faked.take(stop=1)[0], plain.take(stop=1)[0]
    assert np.abs(first.hessian - x.T @ x / len(x)).max() <= 1e-5 * np.abs(first.hessian).max()
    assert not np.array_equal(first.hessian, exact.hessian)
    # Only the stage before quantizes its input: the statistics of the next differ from the plain ones.
    before = Replacement(partial(identity, plain.stages[0]), per_token)
    second = faked.runner.statistics(1, before, None)
    assert second.drift is not None
    assert second.drift.any()
    assert not np.array_equal(second.hessian, plain.take(1, 2)[0].hessian)


def test_without_the_float_path_there_is_no_drift(llama: tuple[ir.Model, list[Feeds]], tmp_path: Path) -> None:
    model, samples = llama
    alone = Run(model, samples, tmp_path / "a", drift=False, weights=coarse).take()
    both = Run(model, samples, tmp_path / "b", weights=coarse).take()
    for a, b in zip(alone, both, strict=True):
        assert a.drift is None
        np.testing.assert_array_equal(a.hessian, b.hessian)


def test_disk_and_memory_give_the_same_bits(llama: tuple[ir.Model, list[Feeds]], tmp_path: Path) -> None:
    model, samples = llama
    held = Run(model, samples, tmp_path / "a", weights=coarse, fake=per_token)
    spilled = Run(model, samples, tmp_path / "b", limit=0, weights=coarse, fake=per_token)
    same_bits(held.take(), spilled.take())
    assert not (tmp_path / "a").exists()
    left = list((tmp_path / "b" / "quantized").iterdir())
    assert len(left) == len(samples), "of all states only the last stage's input is left"


def test_the_number_of_threads_changes_no_bit(
    llama: tuple[ir.Model, list[Feeds]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = llama
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        run = Run(model, samples * 4, tmp_path / str(threads), limit=1 << 12, weights=coarse, fake=per_token)
        found.append(run.take())
    same_bits(found[0], found[1])
    same_bits(found[0], found[2])


@pytest.mark.parametrize(("cut", "limit"), [(1, 1 << 30), (4, 0), (5, 1 << 30), (7, 0)])
def test_saved_half_way_it_goes_on_to_the_same_bits(
    cut: int, limit: int, llama: tuple[ir.Model, list[Feeds]], tmp_path: Path
) -> None:
    model, samples = llama
    expected = Run(model, samples, tmp_path / "a", weights=coarse, fake=per_token).take()
    begun = Run(model, samples, tmp_path / "b", weights=coarse, fake=per_token, limit=limit)
    begun.take(stop=cut)
    (tmp_path / "saved").mkdir()
    begun.runner.save(tmp_path / "saved")
    resumed = Run(model, samples, tmp_path / "c", weights=coarse, fake=per_token, limit=limit)
    resumed.runner.load(tmp_path / "saved")
    same_bits(resumed.take(cut), expected[cut:])


@pytest.mark.parametrize("spelling", ["gemm", "gemm transB", "gemm transA", "gemm transA transB alpha beta"])
def test_gemm_in_all_its_forms(spelling: str, tmp_path: Path) -> None:
    model = model_io.load(hand_decoder.write(tmp_path, hand_decoder.Spec(linear=spelling, mlps=2)))
    samples = [{"input_ids": np.array([[3, 1, 4, 1, 5, 9]])}]
    run = Run(model, samples, tmp_path / "a")
    assert any(linear.transposed_input for stage in run.stages for linear in stage.linears) == ("transA" in spelling)
    names = [stage.input.name or "" for stage in run.stages]
    whole = whole_runs(model, names, samples)[0]
    for stage, name, statistics in zip(run.stages, names, run.take(), strict=True):
        x = rows_of(whole[name], stage.linears[0])
        assert statistics.tokens == 6
        assert statistics.hessian.shape == (stage.linears[0].in_features,) * 2
        expected = x.T @ x / 6
        assert np.abs(statistics.hessian - expected).max() <= 1e-5 * np.abs(expected).max()
        # alpha times W, rounded to float32 once, is not what onnxruntime computes with the two apart.
        assert statistics.drift is not None
        assert np.abs(statistics.drift).max() <= 1e-5 * np.abs(expected).max()
    quantized = Run(model, samples, tmp_path / "b", fake=per_token).take()
    assert all(statistics.drift is not None and statistics.drift.any() for statistics in quantized)


def test_a_stage_may_read_an_input_of_the_graph(tmp_path: Path) -> None:
    onnx.save(graphs.two_linears(), tmp_path / "m.onnx")
    model = model_io.load(tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((1, 3, graphs.IN)).astype(np.float32)} for _ in range(2)]
    run = Run(model, samples, tmp_path / "a", stages=plain_stages(model), fake=per_token)
    first, second = run.take()
    x = per_token(np.concatenate([feeds["x"][0] for feeds in samples])).astype(np.float64)
    np.testing.assert_allclose(first.hessian, x.T @ x / 6, rtol=0, atol=1e-5)
    arrays = graphs.weights()
    hidden = per_token(np.maximum(x @ arrays["W1"] + arrays["b1"], 0).astype(np.float32)).astype(np.float64)
    # A value near a half of its grid may round to the other side: a step of 1/127 of the row's largest.
    np.testing.assert_allclose(second.hessian, hidden.T @ hidden / 6, rtol=0, atol=np.abs(hidden).max() ** 2 / 100)
    assert first.tokens == second.tokens == 6


def test_what_nothing_needs_any_more_is_not_run(tmp_path: Path) -> None:
    """The last block is a parallel one: its attention's output leads to no later stage."""
    width, rng = graphs.IN, np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "V"], ["v"], name="v"),
        node("Sigmoid", ["v"], ["context"]),
        node("MatMul", ["context", "O"], ["o"], name="o"),
        node("MatMul", ["x", "U"], ["u"], name="up"),
        node("Relu", ["u"], ["active"]),
        node("MatMul", ["active", "D"], ["d"], name="down"),
        node("Add", ["o", "d"], ["y"]),
    ]
    constants = {name: rng.standard_normal((width, width)).astype(np.float32) / 4 for name in "VOUD"}
    made = graphs.model(nodes, {"x": ["b", "s", width]}, {"y": ["b", "s", width]}, constants)
    onnx.save(made, tmp_path / "m.onnx")
    model = model_io.load(tmp_path / "m.onnx")
    samples = [{"x": rng.standard_normal((1, 5, width)).astype(np.float32)}]
    run = Run(model, samples, tmp_path / "a", stages=plain_stages(model), fake=per_token, weights=coarse)
    assert [statistics.tokens for statistics in run.take()] == [5, 5, 5]


def test_nan_names_the_sample(tmp_path: Path) -> None:
    onnx.save(graphs.two_linears(), tmp_path / "m.onnx")
    model = model_io.load(tmp_path / "m.onnx")
    good = np.ones((1, 3, graphs.IN), np.float32)
    for bad in (np.nan, np.inf):
        spoilt = good.copy()
        spoilt[0, 1, 2] = bad
        run = Run(model, [{"x": good}, {"x": spoilt}], tmp_path / "a", stages=plain_stages(model))
        with pytest.raises(CalibrationError, match=r"'x' holds NaN or infinity in sample 1"):
            run.take()


def test_samples_that_do_not_fit(llama: tuple[ir.Model, list[Feeds]], tmp_path: Path) -> None:
    model, samples = llama
    missing = {name: array for name, array in samples[1].items() if name != "position_ids"}
    with pytest.raises(CalibrationError, match="does not feed the input 'position_ids'"):
        Run(model, [samples[0], missing], tmp_path)
    with pytest.raises(CalibrationError, match=r"'input_idss', which is no input \(did you mean 'input_ids'"):
        Run(model, [samples[0] | {"input_idss": samples[0]["input_ids"]}], tmp_path)
    for wrong in (samples[0]["position_ids"].astype(np.float32), samples[0]["position_ids"][0]):
        run = Run(model, [samples[1], samples[0] | {"position_ids": wrong}], tmp_path)
        with pytest.raises(CalibrationError, match="cannot run sample 1"):
            run.take()


def test_a_float16_model_sums_in_float32(tmp_path: Path) -> None:
    """Rows whose squares float16 cannot hold."""
    onnx.save(graphs.two_linears(dtype=TensorProto.FLOAT16), tmp_path / "m.onnx")
    model = model_io.load(tmp_path / "m.onnx")
    samples = [{"x": np.full((1, 3, graphs.IN), 300, np.float16)}]
    first, second = Run(model, samples, tmp_path / "a", stages=plain_stages(model), fake=per_token).take()
    assert first.hessian[0, 0] == pytest.approx(9e4, rel=1e-6)
    assert np.isfinite(second.hessian).all()
    assert second.hessian.dtype == np.float64
