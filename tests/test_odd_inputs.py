"""Decoders whose inputs are out of the ordinary are fed by rule, or with arrays of the user, in every command."""

from pathlib import Path

import numpy as np
import odd_decoders as odd
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from quarot_onnx import QConfig, QLayerConfig, UInt8Spec
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.pieces import pieces
from quarot_onnx.calibration.readers import SampleReader
from quarot_onnx.config import Int8Spec
from quarot_onnx.config.algorithm import QuarotConfig, SmoothQuantConfig
from quarot_onnx.errors import CalibrationError, FeedError
from quarot_onnx.evaluation.equivalence import compare
from quarot_onnx.evaluation.outputs import windows_outputs
from quarot_onnx.piecewise.runs import Whole
from quarot_onnx.pipeline import quantize, rotate

# Spec, tokens of a window, and how many of the compared tokens are fed on a cache.
FED = {
    "plain": (odd.Spec(), 12, 4),
    "fixed length": (odd.Spec(batch=1, seq=16, past=0), 16, 0),
    "fixed length and batch": (odd.Spec(batch=3, seq=16, past=0), 16, 0),
    "fixed batch": (odd.Spec(batch=3), 12, 6),
    "fixed mask": (odd.Spec(seq="s", past=0, mask="ones", total=16), 16, 0),
    "fixed mask, empty cache": (odd.Spec(mask="ones", total=16), 16, 0),
    "prefill, empty cache": (odd.Spec(mask="bias", past=0), 12, 0),
    "decode": (odd.Spec(batch=1, seq=1), 12, 66),
    "decode with a mask": (odd.Spec(batch=1, seq=1, mask="ones"), 12, 66),
    "decode, fixed past": (odd.Spec(batch=1, seq=1, past=15, mask="ones"), 16, 60),
    "decode, fixed mask": (odd.Spec(batch=1, seq=1, mask="ones", total=16), 16, 60),
    "decode, all fixed": (odd.Spec(batch=1, seq=1, past=15, mask="bias", total=16), 16, 60),
    "pieces": (odd.Spec(batch=1, seq=4, past=12, mask="bias"), 16, 48),
    "fixed past": (odd.Spec(batch=1, past=80, mask="ones"), 12, 4),
    "logits to keep": (odd.Spec(number="keep"), 12, 4),
    "logits to keep, int32 [1]": (odd.Spec(number="keep", number_shape=(1,)), 12, 4),
    "length of the past": (odd.Spec(number="past"), 12, 4),
    "embeddings": (odd.Spec(ids="embedded"), 12, 4),
    "embeddings and a mask": (odd.Spec(ids="embedded", mask="ones"), 12, 4),
    "embeddings and a bias": (odd.Spec(ids="embedded", mask="bias 3d"), 12, 4),
    "embeddings, decode": (odd.Spec(ids="embedded", mask="ones", batch=1, seq=1), 12, 66),
    "ids clipped": (odd.Spec(ids="clip", mask="ones"), 12, 4),
    "ids replaced": (odd.Spec(ids="where", mask="ones"), 12, 4),
    "ids between": (odd.Spec(ids="max min", mask="ones"), 12, 4),
    "ids moved": (odd.Spec(ids="offset", mask="ones"), 12, 4),
    "bias": (odd.Spec(mask="bias"), 12, 4),
    "bias 3-D": (odd.Spec(mask="bias 3d"), 12, 4),
    "bias for each head": (odd.Spec(mask="bias heads"), 12, 4),
    "bool mask": (odd.Spec(mask="bool"), 12, 4),
    "one that nothing reads": (odd.Spec(unread=True), 12, 4),
    "one that nothing reads, before a mask": (odd.Spec(unread=True, mask="ones", batch=1, seq=4, past=12), 16, 48),
    "bool mask 2-D": (odd.Spec(mask="bool 2d"), 12, 4),
}


def renamed(spec: odd.Spec) -> odd.Spec:
    return odd.Spec(**{**vars(spec), "names": "value_"})


def reference(ids: np.ndarray, path: Path) -> np.ndarray:
    """Logits of a window in one prefill of the same weights in a graph with nothing fixed and its own mask."""
    session = onnxruntime.InferenceSession(path)
    empty = np.zeros((len(ids), odd.HEADS, 0, odd.HEAD_DIM), np.float32)
    feeds = {i.name: ids if i.name == "input_ids" else empty for i in session.get_inputs()}
    return session.run(["logits"], feeds)[0]


def with_weights_of(path: Path, other: Path) -> None:
    """Give a model the large weights of another, which has them in the same order."""
    model, source = onnx.load(path), onnx.load(other)
    large = [t for t in source.graph.initializer if len(t.dims) and t.data_type == odd.FLOAT]
    for tensor, taken in zip(
        (t for t in model.graph.initializer if len(t.dims) and t.data_type == odd.FLOAT), large, strict=True
    ):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(taken), tensor.name))
    onnx.save(model, path)


@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("case", [c for c in FED if not FED[c][0].ids.startswith(("embedded", "offset"))])
def test_what_is_fed_is_one_causal_window(case: str, names: bool, tmp_path: Path):
    """However a window is run, each token sees those before it and nothing else."""
    spec, length, _ = FED[case]
    path, plain = odd.write(tmp_path / "a", renamed(spec) if names else spec), odd.write(tmp_path / "b")
    with_weights_of(path, plain)
    inputs = ModelInputs.from_path(path)
    ids = np.random.default_rng(3).integers(0, odd.VOCAB - 1, (inputs.lengths.batch or 2, length))
    if "prefill" in case or spec.past == 0:
        assert not inputs.has_cache
    decoded = 4 if inputs.has_cache and inputs.lengths.seq is None else 0
    runs = windows_outputs(Whole(onnxruntime.InferenceSession(path)), inputs, [ids], [inputs.logits], decoded)
    found = np.concatenate([logits for _, (logits,) in runs], axis=1)
    # One layer of float32: a few roundings of 6e-8 on logits of about 3.
    np.testing.assert_allclose(found, reference(ids, plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", FED)
def test_rotation_is_proved(case: str, tmp_path: Path):
    spec, _, decoded = FED[case]
    source, target = odd.write(tmp_path / "a", spec), tmp_path / "b" / "model.onnx"
    outcome = rotate(source, target, QuarotConfig())
    assert outcome.equivalence is not None
    assert outcome.equivalence.decode_steps == decoded
    assert outcome.equivalence.tokens >= 64


@pytest.mark.parametrize("case", FED)
def test_a_spoiled_weight_is_found(case: str, tmp_path: Path):
    source = odd.write(tmp_path / "a", FED[case][0])
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if list(tensor.dims) == [odd.HIDDEN, odd.HIDDEN]:  # of Q
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
            break
    spoiled = tmp_path / "b.onnx"
    onnx.save(model, spoiled)
    assert not compare(source, spoiled).passed


def test_a_window_that_does_not_fit(tmp_path: Path):
    inputs = ModelInputs.from_path(odd.write(tmp_path, odd.Spec(batch=1, seq=16, past=0)))
    with pytest.raises(CalibrationError, match=r"windows have 32 tokens, but 'input_ids' takes \[1, 16\]"):
        pieces(inputs, 32)
    with pytest.raises(CalibrationError, match=r"token ids are \[1, 8\]"):
        inputs.feed(np.zeros((1, 8), np.int64))


def test_an_input_that_no_rule_knows(tmp_path: Path):
    source = odd.write(tmp_path / "a", odd.Spec(unknown=True))
    way = r"\(--feeds FILE.npz, feeds=\), or .* \(--no-verify, verify=False\)"
    with pytest.raises(FeedError, match=rf"'temperature' \(FLOAT \[1\]\) is not known: .* {way}"):
        rotate(source, tmp_path / "b.onnx", QuarotConfig())
    empty = np.zeros((1, odd.HEADS, 0, odd.HEAD_DIM), np.float32)
    feeds = {"input_ids": np.arange(12)[None], "temperature": np.ones(1, np.float32)}
    feeds |= {f"past_key_values.0.{part}": empty for part in ("key", "value")}
    outcome = rotate(source, tmp_path / "b.onnx", QuarotConfig(), feeds=[feeds, feeds])
    assert outcome.equivalence is not None
    assert (outcome.equivalence.tokens, outcome.equivalence.decode_steps) == (24, 0)


@pytest.mark.parametrize("spec", [odd.Spec(unknown=True), odd.Spec(batch=1, seq=1, past=15, mask="ones", unknown=True)])
def test_a_given_past_is_rotated_as_the_model_would_have_made_it(spec: odd.Spec, tmp_path: Path):
    source, rng = odd.write(tmp_path / "a", spec), np.random.default_rng(4)
    length = 1 if spec.seq == 1 else 6
    feeds = {"input_ids": np.full((1, length), 7), "temperature": np.ones(1, np.float32)}
    for part in ("key", "value"):
        feeds[f"past_key_values.0.{part}"] = rng.standard_normal((1, odd.HEADS, 15, odd.HEAD_DIM), np.float32)
    if spec.mask:
        feeds["attention_mask"] = np.ones((1, 16), np.int64)
    outcome = rotate(source, tmp_path / "b.onnx", QuarotConfig(r3=True), feeds=feeds)
    assert outcome.equivalence is not None
    assert set(outcome.recipe["rotation"]["counts"]) >= {"R2", "R3"}


def a_past(length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    feeds = {"input_ids": np.full((1, 6), 7), "temperature": np.ones(1, np.float32)}
    shape = (1, odd.HEADS, length, odd.HEAD_DIM)
    return feeds | {f"past_key_values.0.{part}": rng.standard_normal(shape, np.float32) for part in ("key", "value")}


def test_a_given_past_is_rotated_with_a_given_matrix(tmp_path: Path):
    """A record has its hash alone."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((odd.HEAD_DIM, odd.HEAD_DIM)))
    np.save(tmp_path / "r2.npy", q)
    source = odd.write(tmp_path / "a", odd.Spec(unknown=True))
    outcome = rotate(
        source, tmp_path / "b.onnx", QuarotConfig(r2_matrix_path=tmp_path / "r2.npy", r3=True), feeds=a_past(9)
    )
    assert outcome.equivalence is not None
    assert set(outcome.recipe["rotation"]["counts"]) >= {"R2", "R3"}


@pytest.mark.parametrize("rotation", [[], [QuarotConfig(r3=True)]])
def test_a_given_past_is_scaled_as_the_model_would_have_made_it(rotation: list[QuarotConfig], tmp_path: Path):
    source = odd.write(tmp_path / "a", odd.Spec(unknown=True))
    config = QConfig(QLayerConfig(UInt8Spec(), Int8Spec()), algo_config=[*rotation, SmoothQuantConfig(0.8)])
    feeds = a_past(9)
    outcome = quantize(source, tmp_path / "b.onnx", config, SampleReader([feeds]), feeds=feeds, check=None)
    assert outcome.equivalence is not None
    assert outcome.equivalence.tokens == 6
