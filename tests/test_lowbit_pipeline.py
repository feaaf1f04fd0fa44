"""Few bits through the whole pipeline: every method and format, integer for integer, near the fake-quantized model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import lowbit_runs
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import rounded_weights
from lowbit_runs import Seen, config_for, text_reader, watched
from numpy.typing import NDArray
from onnx import numpy_helper

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import GPTAQConfig, GPTQConfig, QuarotConfig
from quarot_onnx.config.spec import Int4Spec, Int8Spec, QLayerConfig, UInt3Spec, UInt4Spec, UInt8Spec
from quarot_onnx.errors import CalibrationError, ConfigError
from quarot_onnx.evaluation.equivalence import compare
from quarot_onnx.evaluation.perplexity import perplexity
from quarot_onnx.pipeline import quantize, rotate
from quarot_onnx.quantization.scheme import QuantizedWeight, WeightScheme
from quarot_onnx.rounding.rtn import round_to_nearest_weight

EXPORTS: dict[str, Callable[[], Path]] = {
    "optimum": lambda: exports.optimum_export("llama"),
    "optimum float16": lambda: exports.optimum_export("llama", dtype="fp16"),
    "optimum phi3": lambda: exports.optimum_export("phi3"),
    "optimum gpt_neox": lambda: exports.optimum_export("gpt_neox"),
    "dynamo": lambda: exports.dynamo_export("llama"),
    "genai": exports.genai_like,
    "genai float16": lambda: exports.genai_like(dtype="fp16"),
    "opset23": exports.opset23_module_export,
}
PROSE = "It was a dark night; the wind went round the house, and nobody in it slept but the child and the dog. " * 6


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def held(found: dict[str, NDArray[Any]], name: str, weight: QuantizedWeight) -> NDArray[Any] | None:
    """The integers of a Linear that a file holds, on the scheme's own numbers; None for real numbers."""
    features, outputs = weight.integers.shape
    for kind in ("int4", "uint4", "int8", "uint8"):
        if f"{name}_{kind}" in found:
            return found[f"{name}_{kind}"].astype(int)
    if f"{name}_packed" in found:
        packed = found[f"{name}_packed"]
        bits = 8 if weight.scheme.bits == 8 else 4
        rows = rounded_weights.unpacked(packed, bits).reshape(outputs, -1)[:, :features]
        return rows.T.astype(int) - (2 ** (bits - 1) - weight.scheme.middle)
    return None


def same_integers(path: Path, seen: Seen) -> None:
    """What the file holds is what the method chose, for every selected node."""
    found = arrays(path)
    assert seen.weights
    for node, weight in seen.weights.items():
        name = seen.initializers[node]
        integers = held(found, name, weight)
        if integers is None:
            real = found[f"{name}_rounded"]
            np.testing.assert_array_equal(real, weight.dequantized().astype(real.dtype))
        else:
            np.testing.assert_array_equal(integers, weight.integers)
        assert name not in found, "no float copy stays behind"


def apart(first: Path, second: Path) -> list[float]:
    """The relative change of the logits of 40 short texts."""
    rows = np.random.default_rng(0).integers(5, 200, (40, 1, 8))
    inputs = [ModelInputs.from_path(path) for path in (first, second)]
    sessions = [ort.InferenceSession(path) for path in (first, second)]
    found = []
    for ids in rows:
        one, other = (
            session.run([own.logits], own.feed(ids))[0] for own, session in zip(inputs, sessions, strict=True)
        )
        found.append(float(np.linalg.norm(other - one) / np.linalg.norm(one)))
    return found


def runs(path: Path) -> NDArray[np.float64]:
    """Logits of a prefill."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = ModelInputs.from_path(path)
    feeds = inputs.feed(np.random.default_rng(0).integers(0, 256, (1, 20)))
    logits: NDArray[np.float64] = session.run([inputs.logits], feeds)[0].astype(np.float64)
    assert np.isfinite(logits).all()
    return logits


@pytest.mark.parametrize("form", lowbit_runs.LAYERS)
@pytest.mark.parametrize("method", lowbit_runs.METHODS)
def test_the_integers_chosen_are_those_written(
    method: str, form: str, llama_optimum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quarot = QuarotConfig() if form == "fake" else None
    with watched(monkeypatch) as seen:
        done = quantize(
            llama_optimum,
            tmp_path / "q.onnx",
            config_for(method, form, quarot=quarot),
            text_reader(llama_optimum),
            verify=False,
            check=None,
        )
    assert len(seen.weights) == 15
    same_integers(tmp_path / "q.onnx", seen)
    runs(tmp_path / "q.onnx")
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
    assert done.recipe["quantization"]["linears"] == 15  # type: ignore[index]
    assert ("round" in done.seconds) is (method != "rtn")
    # The head, which no Hessian is taken for, is rounded to nearest.
    assert seen.calls[-1] == "/lm_head/MatMul"
    assert seen.plain == (seen.calls if method == "rtn" else ["/lm_head/MatMul"])
    assert len(seen.calls) == (15 if method == "rtn" else 9)


@pytest.mark.parametrize("export", EXPORTS)
def test_every_exporter(export: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotated where the model can be, rounded, written, run."""
    source = EXPORTS[export]()
    quarot = None if "neox" in export else QuarotConfig(use_random_had=True, seed=5)
    with watched(monkeypatch) as seen:
        done = quantize(source, tmp_path / "q.onnx", config_for("gptaq", "w4a8", quarot=quarot), text_reader(source))
    assert quarot is None or (done.equivalence is not None and done.equivalence.passed)
    same_integers(tmp_path / "q.onnx", seen)
    # 4 bits on weights of random numbers: some 10 % of the logits' size per Linear, over two blocks.
    assert 1e-3 < compare(source, tmp_path / "q.onnx", real_tokens=48, random_tokens=0).rel_l2 < 0.7
    runs(tmp_path / "q.onnx")


@pytest.mark.parametrize("form", ["w4a8", "nbits", "w8"])
def test_what_is_deployed_is_what_was_studied(form: str, llama_optimum: Path, tmp_path: Path) -> None:
    """The same integers in a deployable format and as real numbers: the same logits, the same perplexity."""
    layer = lowbit_runs.LAYERS[form]
    for output in (form, "fake"):
        config = QConfig(layer, algo_config=[GPTQConfig()], output_format=output)
        quantize(llama_optimum, tmp_path / f"{output}.onnx", config, text_reader(llama_optimum), check=None)
    real, deployed = tmp_path / "fake.onnx", tmp_path / f"{form}.onnx"
    # Alike but for the order of sums. Beside 8-bit activations a value near a half may round to the other side, which
    # changes all later tokens of its text: of many short texts few hold such a value.
    changes = apart(real, deployed)
    assert np.median(changes) < 1e-5
    assert max(changes) < (1e-5 if form == "nbits" else 0.1)
    (tmp_path / "text.txt").write_text(PROSE)
    figures = [
        perplexity(path, tmp_path / "text.txt", llama_optimum.parent, seq_len=64, windows=4).perplexity
        for path in (real, deployed)
    ]
    assert figures[0] == pytest.approx(figures[1], rel=5e-3)
    if form != "w8":  # 8 bits to 4
        assert deployed.stat().st_size < 0.6 * real.stat().st_size


def test_fewer_bits_cost_more_and_gptq_gives_some_back(llama_optimum: Path, tmp_path: Path) -> None:
    """Logits against the float model's, on the text that was calibrated on."""

    def error(spec: Any, *algorithms: Any) -> float:
        config = QConfig(QLayerConfig(weight=spec), exclude=["/lm_head/MatMul"], algo_config=[*algorithms])
        quantize(llama_optimum, tmp_path / "q.onnx", config, reader, check=None)
        return compare(llama_optimum, tmp_path / "q.onnx", token_ids=reader.token_windows).rel_l2

    reader = text_reader(llama_optimum)
    rtn4, gptq4, gptq8, rtn3 = (
        error(Int4Spec()),
        error(Int4Spec(), GPTQConfig()),
        error(Int8Spec(quant_granularity="Channel"), GPTQConfig()),
        error(UInt3Spec()),
    )
    assert gptq8 < gptq4 < rtn4 < rtn3
    assert gptq8 < 0.02


@pytest.mark.parametrize("per", ["Channel", "Tensor"])
def test_static_activations_with_gptq_weights(
    per: str, llama_optimum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = QLayerConfig(UInt8Spec(), Int8Spec(quant_granularity=per))
    with watched(monkeypatch) as seen:
        quantize(
            llama_optimum,
            tmp_path / "q.onnx",
            QConfig(layer, algo_config=[GPTAQConfig()]),
            text_reader(llama_optimum),
            check=None,
        )
    assert seen.calls[0].count("proj") == (3 if per == "Channel" else 1)
    same_integers(tmp_path / "q.onnx", seen)
    assert compare(llama_optimum, tmp_path / "q.onnx", real_tokens=64, random_tokens=0).rel_l2 < 0.2


class OnceOnly:
    """The least that a calibration reader can be: it is read once, and cannot start over."""

    def __init__(self, feeds: list[Any]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Any:
        return next(self._feeds, None)


def test_a_reader_is_read_once(llama_optimum: Path, tmp_path: Path) -> None:
    """Ranges and Hessians from the same samples, though the reader cannot be rewound; nobody decodes for it."""
    config = QConfig(
        QLayerConfig(UInt8Spec(), Int8Spec(quant_granularity="Channel")), algo_config=[GPTQConfig()], CalibDataSize=3
    )
    feeds = list(text_reader(llama_optimum))
    for name, reader in (("a", text_reader(llama_optimum, decode_steps=0)), ("b", OnceOnly(feeds))):
        quantize(llama_optimum, tmp_path / f"{name}.onnx", config, reader)
    first, second = arrays(tmp_path / "a.onnx"), arrays(tmp_path / "b.onnx")
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_head_and_embedding(bits: int, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to nearest, each on its own, though the decoder is not."""
    source = exports.optimum_export("llama", tied=tied)
    spec = UInt4Spec() if bits == 4 else Int8Spec(quant_granularity="Channel")
    layer = QLayerConfig(weight=spec)
    config = QConfig(
        QLayerConfig(weight=Int4Spec(group_size=32)),
        {layer: ["/lm_head/MatMul"]},
        {layer: ["Gather"]},
        algo_config=[GPTQConfig()],
    )
    with watched(monkeypatch) as seen:
        done = quantize(source, tmp_path / "q.onnx", config, text_reader(source), check=None)
    assert done.recipe["quantization"]["embeddings"] == 1  # type: ignore[index]
    assert seen.calls[-2:] == ["/lm_head/MatMul", "/model/embed_tokens/Gather"]
    original = arrays(source)
    scheme = WeightScheme(bits, symmetric=bits == 8, signed=bits == 8)
    for node in seen.calls[-2:]:
        weight = original[seen.initializers[node]].astype(np.float64)
        channels = weight if weight.shape[0] == 64 else weight.T  # [hidden, vocabulary]
        expected = round_to_nearest_weight(channels, scheme, node, clip=True)
        np.testing.assert_array_equal(seen.weights[node].integers, expected.integers)
        np.testing.assert_array_equal(seen.weights[node].scale, expected.scale)
    logits = runs(tmp_path / "q.onnx")
    assert np.corrcoef(logits.ravel(), runs(source).ravel())[0, 1] > 0.8
    large = [
        name for name, array in arrays(tmp_path / "q.onnx").items() if array.dtype.kind == "f" and array.size > 9e3
    ]
    assert not large, "no float table stays behind"


def test_two_steps_are_one(llama_optimum: Path, tmp_path: Path) -> None:
    """Rotated first, then rounded with a configuration that names the same rotation, or none."""
    quarot = QuarotConfig(use_random_had=True, seed=3)
    quantize(
        llama_optimum, tmp_path / "one.onnx", config_for("gptq", "w4a8", quarot=quarot), text_reader(llama_optimum)
    )
    rotate(llama_optimum, tmp_path / "r.onnx", QuarotConfig(use_random_had=True, seed=3, r4=True), verify=False)
    for named in (quarot, None):
        config = config_for("gptq", "w4a8", quarot=named)
        done = quantize(tmp_path / "r.onnx", tmp_path / "two.onnx", config, text_reader(llama_optimum))
        assert done.equivalence is None
        assert done.recipe["rotation"]["rotations"]["R1"]["seed"] == 3  # type: ignore[index]
        one, two = arrays(tmp_path / "one.onnx"), arrays(tmp_path / "two.onnx")
        assert one.keys() == two.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, two[name])


def test_input_errors_leave_nothing(llama_optimum: Path, tmp_path: Path) -> None:
    gptq = [QuarotConfig(), GPTQConfig()]
    table = QLayerConfig(weight=UInt4Spec(group_size=128))
    group = QLayerConfig(UInt4Spec(quant_granularity="Token", group_size=24), Int4Spec())
    reader = text_reader(llama_optimum)
    cases: list[tuple[type[Exception], str, QConfig, Any]] = [
        (
            ConfigError,
            r"group_size=48 of the weight does not divide the 64 input features of '.*q_proj",
            _grouped(48),
            reader,
        ),
        (
            ConfigError,
            "group_size=24 of the activation does not divide the 64 .* or leave the node in float .exclude, --exclude.",
            QConfig(group, algo_config=gptq),
            reader,
        ),
        (
            ConfigError,
            r"group_size=128 of the weight does not divide the 64 input features of '.*embed_tokens",
            QConfig(QLayerConfig(weight=Int4Spec()), None, {table: ["Gather"]}, algo_config=gptq),
            reader,
        ),
        (CalibrationError, "gptq needs calibration data: pass a CalibrationDataReader", _grouped(32), None),
        (CalibrationError, "is no calibration reader", _grouped(32), object()),
        (CalibrationError, "OnceOnly is empty", _grouped(32), OnceOnly([])),
    ]
    for kind, message, config, given in cases:
        with pytest.raises(kind, match=message) as raised:
            quantize(llama_optimum, tmp_path / "new" / "q.onnx", config, given)
        assert raised.value.exit_status == 2  # type: ignore[attr-defined]
        assert "\n" not in str(raised.value)
        assert not list(tmp_path.iterdir())


def _grouped(size: int) -> QConfig:
    form = "nbits" if size in (16, 32) else "fake"
    return QConfig(
        QLayerConfig(weight=Int4Spec(group_size=size)), algo_config=[QuarotConfig(), GPTQConfig()], output_format=form
    )
