import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny_decoders as tiny
from onnx import TensorProto

from quarot_onnx.calibration import fetching, observing
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.ranges import RangeRule, collect_ranges
from quarot_onnx.calibration.readers import TokenReader
from quarot_onnx.config.enums import CalibMethod
from quarot_onnx.errors import CalibrationError
from quarot_onnx.io import model_io

NAMES = ["x", "context", "h", "k0", "logits"]


class VaryingReader:
    """Prefills of different lengths."""

    def __init__(self, path, lengths=(3, 9, 5)):
        rng, inputs = np.random.default_rng(0), ModelInputs.from_path(path)
        self.feeds = [inputs.feed(rng.integers(0, tiny.VOCAB, (1, length))) for length in lengths]
        self.rewind()

    def get_next(self):
        return next(self.rest, None)

    def rewind(self):
        self.rest = iter(self.feeds)


def activations(path, feeds: list) -> dict[str, list[np.ndarray]]:
    """What the tensors hold, fetched the plain way."""
    model = onnx.load(path)
    have = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in NAMES if name not in have)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return {name: [session.run([name], feed)[0] for feed in feeds] for name in NAMES}


@pytest.mark.parametrize("external", [False, True])
def test_minmax_is_exact(tmp_path, external: bool):
    path = tiny.save(tiny.build(), tmp_path, external=external)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    reader = VaryingReader(path)
    found = collect_ranges(path, NAMES, reader)
    for name, parts in activations(path, reader.feeds).items():
        # Other fusions, other order of summation: a few float32 roundoffs.
        assert found[name].min == pytest.approx(min(part.min() for part in parts), rel=1e-5)
        assert found[name].max == pytest.approx(max(part.max() for part in parts), rel=1e-5)
    assert list(found) == NAMES
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("budget", [1, 1 << 29])
def test_percentile_equals_quantiles(tmp_path, monkeypatch, budget: int):
    monkeypatch.setattr(fetching, "_BUDGET", budget)
    path = tiny.save(tiny.build(), tmp_path)
    reader = VaryingReader(path)
    found = collect_ranges(path, NAMES, reader, rule=RangeRule(CalibMethod.Percentile, 90.0))
    for name, parts in activations(path, reader.feeds).items():
        values = np.concatenate([part.ravel() for part in parts])
        low, high = (np.quantile(values, q, method="inverted_cdf") for q in (0.05, 0.95))
        # Rounded outwards to a bin of relative width 2^-8.
        assert found[name].min == pytest.approx(low, rel=2**-7)
        assert found[name].max == pytest.approx(high, rel=2**-7)
        assert found[name].min <= low * (1 - 1e-5 * np.sign(low))
        assert found[name].max >= high * (1 - 1e-5 * np.sign(high))


def test_percentile_100_is_minmax(tmp_path):
    path = tiny.save(tiny.build(), tmp_path)
    exact = collect_ranges(path, NAMES, VaryingReader(path))
    assert collect_ranges(path, NAMES, VaryingReader(path), rule=RangeRule(CalibMethod.Percentile, 100)) == exact


def test_groups_fill_the_budget_in_order(monkeypatch):
    monkeypatch.setattr(fetching, "_BUDGET", 10)
    assert fetching._groups({"a": 4, "b": 6, "c": 1, "d": 50, "e": 2}) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_float16_tensors(tmp_path):
    path = tiny.save(tiny.build(tiny.Spec(dtype=TensorProto.FLOAT16)), tmp_path)
    found = collect_ranges(path, ["k0"], VaryingReader(path))["k0"]
    assert found.min < 0 < found.max
    assert found.max == np.float16(found.max)


def test_a_loaded_model_is_not_changed(tmp_path):
    path = tiny.save(tiny.build(), tmp_path)
    model = model_io.load(path)
    nodes, outputs = len(model.graph), list(model.graph.outputs)
    assert collect_ranges(model, ["h"], VaryingReader(path)) == collect_ranges(path, ["h"], VaryingReader(path))
    assert (len(model.graph), list(model.graph.outputs)) == (nodes, outputs)


def test_the_head_is_left_out(tmp_path):
    """A head whose result nobody asks for is not run: its NaN goes unnoticed."""
    arrays = tiny.weights()
    arrays["Wh"][:] = np.nan
    path = tiny.save(tiny.build(arrays=arrays), tmp_path)
    session = observing.observing_session(model_io.load(path), ["h"], ("ReduceMin",), None)
    assert len(session.get_outputs()) == 1
    assert np.isfinite(collect_ranges(path, ["h"], VaryingReader(path))["h"].max)


@pytest.mark.parametrize("method", [m for m in CalibMethod.supported() if m is not CalibMethod.Auto])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named(tmp_path, method: CalibMethod, bad: float):
    arrays = tiny.weights()
    arrays["E"][7, 3] = bad
    path = tiny.save(tiny.build(arrays=arrays), tmp_path)
    reader = TokenReader(ModelInputs.from_path(path), np.array([[1, 2, 3], [4, 7, 5]]))
    with pytest.raises(CalibrationError, match=r"'x' holds NaN or infinity in sample 1"):
        collect_ranges(path, ["x"], reader, rule=RangeRule(method))


def test_max_samples_and_progress(tmp_path):
    path = tiny.save(tiny.build(), tmp_path)
    reader = TokenReader(ModelInputs.from_path(path), np.arange(12).reshape(4, 3))
    seen: list[tuple[int, int | None]] = []
    collect_ranges(path, ["h"], reader, max_samples=2, progress=lambda *now: seen.append(now))
    assert seen == [(1, 2), (2, 2)]
    with pytest.raises(CalibrationError, match="max_samples 0"):
        collect_ranges(path, ["h"], reader, max_samples=0)


def test_readers_that_do_not_fit(tmp_path):
    path = tiny.save(tiny.build(), tmp_path)
    empty, missing, unknown = (VaryingReader(path, lengths) for lengths in ((), (3,), (3,)))
    with pytest.raises(CalibrationError, match="is empty"):
        collect_ranges(path, ["h"], empty)
    del missing.feeds[0]["position_ids"]
    with pytest.raises(CalibrationError, match="does not feed the input 'position_ids'"):
        collect_ranges(path, ["h"], missing)
    unknown.feeds[0]["input_id"] = unknown.feeds[0].pop("input_ids")
    with pytest.raises(CalibrationError, match=r"feeds 'input_id', which is no input \(did you mean 'input_ids'"):
        collect_ranges(path, ["h"], unknown)
    wrong = VaryingReader(path, (3,))
    wrong.feeds[0]["position_ids"] = wrong.feeds[0]["position_ids"] + 1000
    with pytest.raises(CalibrationError, match="cannot run sample 0"):
        collect_ranges(path, ["h"], wrong)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("contxt", "did you mean 'context'"),
        ("Wk", "is a weight"),
        ("length", "INT64"),
        ("past_key_values.0.key", "empty"),
    ],
)
def test_tensors_without_a_range(tmp_path, name: str, message: str):
    path = tiny.save(tiny.build(), tmp_path)
    model = model_io.load(path)
    next(value for node in model.graph for value in node.outputs if value.name == "length").dtype = ir.DataType.INT64
    with pytest.raises(CalibrationError, match=message):
        collect_ranges(model, [name], VaryingReader(path))


def test_percentile_is_checked(tmp_path):
    with pytest.raises(CalibrationError, match="percentile 0"):
        collect_ranges(tmp_path / "model.onnx", ["h"], VaryingReader, rule=RangeRule(CalibMethod.Percentile, 0))
