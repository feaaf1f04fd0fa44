"""Whatever is calibrated on, a past is one that the calibrated model makes: R2, R3 and SmoothQuant change caches.

One decoder twice, with equal weights: its lengths fixed, so that windows are run in pieces, and free, so that they are
run whole. Both give the same statistics, up to rounding, unless a piece stands on the cache of another model.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import odd_decoders as odd
import onnx
import pytest
from decode_feeds import decode_feeds
from onnx import numpy_helper

from quarot_onnx import GPTQConfig, QConfig, QLayerConfig, QuarotConfig, SinkPrefixConfig, SmoothQuantConfig, UInt8Spec
from quarot_onnx.calibration.decoding import Decoding
from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.leading import behind
from quarot_onnx.calibration.readers import DataReader, SampleReader, TokenReader, wrap
from quarot_onnx.config import Int8Spec
from quarot_onnx.io import model_io
from quarot_onnx.io.lengths import fix_lengths
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.pipeline import quantize
from quarot_onnx.quantization import static_ranges
from quarot_onnx.quantization.select import Selection
from quarot_onnx.quantization.static_ranges import calibrate
from quarot_onnx.rounding import lowbit
from quarot_onnx.rounding.lowbit import Task, round_weights
from quarot_onnx.sessions import runtime

IDS = np.random.default_rng(8).integers(0, odd.VOCAB, (3, 16))
FREE = odd.Spec()
FIXED = {
    "length and room": odd.Spec(batch=1, seq=4, past=12, mask="bias"),
    "length": odd.Spec(batch=1, seq=4),
    "decode": odd.Spec(batch=1, seq=1, past=15, mask="ones"),
}
R2 = {"r1": False, "r3": False, "r4": False}
CHANGES = {
    "nothing": [],
    "R2": [QuarotConfig(**R2)],
    "R2 randomised": [QuarotConfig(**R2, use_random_had=True, seed=3)],
    "R1 R2 R3 R4": [QuarotConfig(r3=True)],
    "SmoothQuant": [SmoothQuantConfig(0.8)],
    "R2 SmoothQuant": [QuarotConfig(r3=True, r4=False), SmoothQuantConfig(0.8)],
}
STATIC = QLayerConfig(UInt8Spec(), Int8Spec())


def write(folder: Path, spec: odd.Spec) -> Path:
    """The decoder; a channel of each head's values is an outlier, so that it matters in which basis they are."""
    path = odd.write(folder, spec)
    model = onnx.load(path)
    large = [t for t in model.graph.initializer if list(t.dims) == [odd.HIDDEN, odd.HIDDEN]]
    value = numpy_helper.to_array(large[2]).copy()
    value[:, [3, odd.HEAD_DIM + 5]] *= 30
    large[2].CopyFrom(numpy_helper.from_array(value, large[2].name))
    onnx.save(model, path)
    return path


def scales(path: Path) -> list[float]:
    """The scales of activations, in the order of the graph."""
    model = onnx.load(path)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    return [float(arrays[node.input[1]]) for node in nodes if node.input[1] in arrays]


def tokens(path: Path) -> TokenReader:
    return TokenReader(ModelInputs.from_path(path), IDS, path, decode_steps=0)


@pytest.mark.parametrize("lengths", FIXED)
@pytest.mark.parametrize("change", CHANGES)
def test_ranges_are_those_of_whole_windows(change: str, lengths: str, tmp_path: Path) -> None:
    found = []
    for name, spec in (("free", FREE), ("fixed", FIXED[lengths])):
        source, target = write(tmp_path / name, spec), tmp_path / name / "q.onnx"
        quantize(source, target, QConfig(STATIC, algo_config=CHANGES[change]), tokens(source), verify=False, check=None)
        found.append(scales(target))
    assert len(found[0]) > 3
    # Sums in another order: float32 roundings of values up to some hundred times their row's others.
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


class Pasts(SampleReader):
    """Halves of windows on the caches of the first halves; each sample is followed by decode steps."""

    decode_steps = 3


EXPORTS = {
    "optimum": lambda: exports.optimum_export("llama"),
    "dynamo": lambda: exports.dynamo_export("llama", with_cache=True),
    "genai": lambda: exports.genai_like(tied_transposed=False),
}
TEXT = np.random.default_rng(9).integers(5, 250, (12, 32))
HALF, STEPS, PREFIX, PREFIXES = 16, 3, [256, 9], ("graph", "npz")


def source_of(exporter: str, way: str, folder: Path) -> Path:
    """The export; where windows are to be run in pieces, with fixed lengths."""
    original = EXPORTS[exporter]()
    if way != "pieces":
        return original
    source = Path(shutil.copytree(original.parent, folder / "fixed")) / original.name
    fix_lengths(source, {"batch_size": 1, "sequence_length": 8, "past_sequence_length": 24})
    return source


def reader_of(source: Path, way: str) -> DataReader:
    inputs = ModelInputs.from_path(source)
    if way == "pasts":
        session = runtime.session(source)
        names = [present for _, present in inputs.presents]
        left = [session.run(names, inputs.feed(row[None, :HALF])) for row in TEXT]
        caches = [inputs.present_to_past(dict(zip(names, arrays, strict=True))) for arrays in left]
        return Pasts([inputs.feed(row[None, HALF:], cache, HALF) for row, cache in zip(TEXT, caches, strict=True)])
    return TokenReader(inputs, TEXT, source, decode_steps=0 if way == "pieces" else STEPS)


class Spy:
    """Runs whatever is calibrated on through the calibrated float model, and compares with the original's logits."""

    def __init__(self, original: Path, way: str) -> None:
        session, inputs = runtime.session(original), ModelInputs.from_path(original)
        ids = behind(PREFIX, TEXT) if way in PREFIXES else TEXT
        self.expected = session.run([inputs.logits], inputs.feed(ids))[0]
        self.first = HALF if way == "pasts" else len(PREFIX) if way in PREFIXES else 0
        self.way, self.compared = way, 0
        self.session: Any = None

    def compare(self, feeds: Feeds, row: int, first: int) -> None:
        [found] = self.session.run(["logits"], feeds)
        expected = self.expected[row : row + 1, first : first + found.shape[1]]
        # A rotation's noise, see `rotating`; in another basis the cache gives 1e-1 and more.
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(self.expected).max())
        self.compared += 1

    def samples(self, samples: Iterable[Feeds], decoding: Decoding | None) -> None:
        pieces = 4 if self.way == "pieces" else 1
        for number, feeds in enumerate(samples):
            row, piece = divmod(number, pieces)
            self.compare(feeds, row, self.first + 8 * piece)
            for step, more in enumerate([] if decoding is None else decode_feeds(decoding, self.session, feeds)):
                self.compare(more, row, self.first + (TEXT.shape[1] - self.first * (self.way == "pasts")) // 8 + step)

    def calibrate(self, selection: Selection, reader: DataReader, **options: Any) -> Any:
        file = model_io.source_of(selection.survey.model)
        assert file is not None
        self.session = runtime.session(file)
        self.samples(wrap(reader), options["decoding"])
        return calibrate(selection, reader, **options)

    def round(self, task: Task, *rest: Any) -> Any:
        self.samples(task.samples, None)
        return round_weights(task, *rest)


CASES = [
    *(
        ("optimum", way, change)
        for way in ("pieces", "pasts")
        for change in (*CHANGES, "dense R2")
        if change != "nothing"
    ),
    *((exporter, way, "R2 SmoothQuant") for exporter in EXPORTS for way in ("steps", "graph", "npz")),
    *((exporter, "pasts", "R2 SmoothQuant") for exporter in ("dynamo", "genai")),
]


@pytest.mark.parametrize(("exporter", "way", "change"), CASES)
def test_the_calibrated_model_computes_what_the_original_does(
    exporter: str, way: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges, decode steps and Hessians: every feed gives the logits of the whole text."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((32, 32)))
    np.save(tmp_path / "r2.npy", q)
    algorithms = CHANGES.get(change) or [QuarotConfig(r2_matrix_path=tmp_path / "r2.npy")]
    if way in PREFIXES:
        algorithms = [*algorithms, SinkPrefixConfig(form=way, ids=PREFIX)]
    source = source_of(exporter, way, tmp_path)
    spy = Spy(EXPORTS[exporter](), way)
    monkeypatch.setattr(static_ranges, "calibrate", spy.calibrate)
    monkeypatch.setattr(lowbit, "round_weights", spy.round)
    config = QConfig(STATIC, algo_config=[*algorithms, GPTQConfig()])
    quantize(source, tmp_path / "q.onnx", config, reader_of(source, way), verify=False, check=None)
    samples = len(TEXT) * (4 if way == "pieces" else 1)
    assert spy.compared == 2 * samples + (0 if way == "pieces" else len(TEXT) * STEPS)


@pytest.mark.parametrize("exporter", ["optimum", "genai"])
def test_windows_in_pieces_are_the_same_by_stages(exporter: str, tmp_path: Path) -> None:
    """All windows go through one piece of the model before the next is opened, begun anew wherever they are left."""
    source = source_of(exporter, "pieces", tmp_path)
    inputs, done = ModelInputs.from_path(source), list[tuple[int, int | None]]()
    whole = TokenReader(inputs, TEXT, source, memory=Memory(by_stages=False))
    staged = TokenReader(
        inputs, TEXT, source, memory=Memory(1 << 20, by_stages=True), progress=lambda *step: done.append(step)
    )
    for _ in range(3):
        staged.get_next()
    staged.rewind()
    done.clear()
    samples = list(zip(whole, staged, strict=True))
    assert len(samples) == 4 * len(TEXT)
    for one, other in samples:
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    runs = 3 * len(TEXT)  # a window's last piece leaves a cache to nobody
    assert done[-1][0] == done[-1][1]
    assert done[-1][0] % runs == 0
    assert done[-1][0] > runs
    assert all(samples[3][0][past].any() for past, _ in inputs.presents)
