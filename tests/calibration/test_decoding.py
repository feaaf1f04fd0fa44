"""Ranges see decode steps on the model's own cache, where a graph has one and its lengths are free."""

from dataclasses import replace
from pathlib import Path

import exports
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command_line import Shell
from decode_feeds import decode_feeds
from onnx import TensorProto, helper, numpy_helper

from quarot_onnx import ModelQuantizer, QConfig, QLayerConfig, QuarotConfig, SinkPrefixConfig, UInt8Spec
from quarot_onnx.calibration.decoding import DEFAULT_STEPS, Decoding, decoding_on, find_decoding
from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.padding import Sample
from quarot_onnx.calibration.ranges import RangeRule, collect_ranges
from quarot_onnx.calibration.readers import NpzReader, SampleReader, TextReader, TokenReader, wrap
from quarot_onnx.config import Int8Spec
from quarot_onnx.config.enums import CalibMethod
from quarot_onnx.errors import CalibrationError
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.pipeline import rotate
from quarot_onnx.sessions import runtime

STATIC = QLayerConfig(UInt8Spec(), Int8Spec())
LENGTH = 40
CACHED = {
    "optimum": lambda: exports.optimum_export("llama"),
    "dynamo": lambda: exports.dynamo_export("llama", with_cache=True),
    "genai": lambda: exports.genai_like(tied_transposed=False),
}


def decoding_of(path: Path, steps: int | None = None) -> Decoding:
    found, notes = find_decoding(model_io.load(path), path.parent, steps)
    assert found is not None
    assert not notes
    return found


def logits_match(
    path: Path, sample: Feeds, ids: np.ndarray, steps_asked: int | None = None, *, apart: bool = False
) -> int:
    """Compare the logits of the decode steps with those of the prefill; how many there were."""
    decoding = replace(decoding_of(path, steps_asked), apart=apart)
    session = runtime.session(path)
    inputs = decoding.inputs
    [whole] = session.run([inputs.logits], sample)
    steps = list(decode_feeds(decoding, session, sample))
    for number, feeds in enumerate(steps):
        at = ids.shape[1] // 8 + number
        assert feeds[inputs.tokens].tolist() == ids[:, at : at + 1].tolist()
        [logits] = session.run([inputs.logits], feeds)
        # The same sums in another order: some hundred float32 roundings.
        np.testing.assert_allclose(logits[:, -1], whole[:, at], atol=1e-5 * np.abs(whole).max())
    return len(steps)


@pytest.mark.parametrize("exporter", CACHED)
def test_steps_stand_on_the_cache_of_what_precedes_them(exporter: str) -> None:
    path = CACHED[exporter]()
    ids = np.random.default_rng(0).integers(0, 256, (1, LENGTH))
    for apart in (False, True):
        assert logits_match(path, ModelInputs.from_path(path).feed(ids), ids, apart=apart) == DEFAULT_STEPS


@pytest.mark.parametrize("exporter", CACHED)
@pytest.mark.parametrize("method", [CalibMethod.MinMax, CalibMethod.Percentile])
def test_the_cache_is_that_of_the_first_part_alone(exporter: str, method: CalibMethod) -> None:
    path = CACHED[exporter]()
    reader = TextReader(path, samples=2, seq_len=LENGTH)
    loaded, decoding = model_io.load(path), decoding_of(path)
    names = [
        value.name or "" for node in loaded.graph if node.op_type == "MatMul" for value in node.inputs[:1] if value
    ]
    found = [
        collect_ranges(path, names, reader, rule=RangeRule(method), decoding=replace(decoding, apart=apart), memory=how)
        for apart in (False, True)
        for how in (Memory(by_stages=False), Memory(200_000, by_stages=True))
    ]
    assert all(other == found[0] for other in found[1:])


def test_a_sample_that_is_fed_in_another_way_leaves_no_cache() -> None:
    path = exports.optimum_export("llama")
    decoding = decoding_of(path)
    ids = np.arange(16)[None]
    plain = decoding.inputs.feed(ids)
    masked = {**plain, "attention_mask": np.array([[0] * 3 + [1] * 13])}
    for feeds, silent in ((plain, 0), (masked, 1)):
        parts = [Sample(feeds, 0)]
        assert sum(part.silent for part in decoding.samples(feeds, 0, parts)) == silent
    seen = Sample(plain, 0, visible=np.ones((1, 16), bool))
    assert sum(part.silent for part in decoding.samples(plain, 0, [seen])) == 1


def test_where_a_graph_branches_the_first_part_is_run_by_itself(tmp_path: Path) -> None:
    model = onnx.load(exports.optimum_export("llama"))
    assert not decoding_of(exports.optimum_export("llama")).apart
    output = model.graph.output[0].name
    node = next(node for node in model.graph.node if output in node.output)
    node.output[list(node.output).index(output)] = "before"
    ways = [
        helper.make_graph(
            [helper.make_node("Identity", ["before"], [name])], name, [], [helper.make_empty_tensor_value_info(name)]
        )
        for name in ("then", "else")
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.ones((), bool), "way"))
    model.graph.node.append(helper.make_node("If", ["way"], [output], then_branch=ways[0], else_branch=ways[1]))
    onnx.save(model, tmp_path / "model.onnx")
    loaded = model_io.load(tmp_path / "model.onnx")
    assert decoding_on(loaded, ModelInputs.from_model(loaded), 1).apart


def test_all_rows_of_a_batch_are_decoded() -> None:
    path = exports.optimum_export("llama")
    ids = np.random.default_rng(0).integers(0, 256, (2, LENGTH))
    assert logits_match(path, ModelInputs.from_path(path).feed(ids), ids, 3) == 3


@pytest.mark.parametrize("exporter", CACHED)
def test_behind_a_prefix_in_the_graph(exporter: str, tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    rotate(CACHED[exporter](), target, QuarotConfig(), prefix=SinkPrefixConfig(form="graph", ids=(256, 9)))
    ids = np.random.default_rng(1).integers(0, 256, (1, LENGTH))
    assert logits_match(target, ModelInputs.from_path(target).feed(ids), ids) == DEFAULT_STEPS


@pytest.mark.parametrize("exporter", CACHED)
def test_behind_a_prefix_that_is_fed(exporter: str) -> None:
    path = CACHED[exporter]()
    inputs, rng = ModelInputs.from_path(path), np.random.default_rng(2)
    names = [present for _, present in inputs.presents]
    outputs = runtime.session(path).run(names, inputs.feed(np.array([[256, 9]])))
    past = inputs.present_to_past(dict(zip(names, outputs, strict=True)))
    ids = rng.integers(0, 256, (1, LENGTH))
    assert logits_match(path, inputs.feed(ids, past, 2), ids) == DEFAULT_STEPS


@pytest.mark.parametrize(("tokens", "steps"), [(1, 0), (2, 1), (3, 2), (9, 4)])
def test_a_short_sample_has_few(tokens: int, steps: int) -> None:
    path = exports.optimum_export("llama")
    sample = ModelInputs.from_path(path).feed(np.arange(tokens)[None])
    assert len(list(decoding_of(path).samples(sample, 0, [Sample(sample, 0)]))) == steps


@pytest.mark.parametrize("method", [CalibMethod.MinMax, CalibMethod.Percentile, CalibMethod.MinMSE])
def test_what_only_a_decode_step_has_is_in_the_ranges(method: CalibMethod) -> None:
    path = exports.optimum_export("llama")
    reader = TextReader(path, samples=2, seq_len=LENGTH)
    past = reader.inputs.presents[0][0]
    rule = RangeRule(method, percentile=100)
    with pytest.raises(CalibrationError, match="empty in every sample"):
        collect_ranges(path, [past], reader, rule=rule)
    found = collect_ranges(path, [past], reader, rule=rule, decoding=decoding_of(path, 2))
    assert found[past].min < 0 < found[past].max


def growing(folder: Path) -> Path:
    """A model whose down projections' inputs are ten times as large where there is a past."""
    source = exports.optimum_export("llama")
    (folder / "tokenizer.json").write_bytes((source.parent / "tokenizer.json").read_bytes())
    model = onnx.load(source)
    past = next(value.name for value in model.graph.input if value.name.startswith("past"))
    down = next(node for node in model.graph.node if node.op_type == "MatMul" and "down_proj" in node.name)
    constants = {"decode/axis": np.array(2), "decode/one": np.array(1), "decode/nine": np.array(9.0, np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    nodes = [
        helper.make_node("Shape", [past], ["decode/shape"]),
        helper.make_node("Gather", ["decode/shape", "decode/axis"], ["decode/length"]),
        helper.make_node("Min", ["decode/length", "decode/one"], ["decode/any"]),
        helper.make_node("Cast", ["decode/any"], ["decode/float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["decode/float", "decode/nine"], ["decode/more"]),
        helper.make_node("Mul", [down.input[0], "decode/more"], ["decode/added"]),
        helper.make_node("Add", [down.input[0], "decode/added"], ["decode/input"]),
    ]
    at = list(model.graph.node).index(down)
    down.input[0] = "decode/input"
    for offset, node in enumerate(nodes):
        model.graph.node.insert(at + offset, node)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def down_scale(path: Path) -> float:
    model = onnx.load(path)
    scales = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    [node] = [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "decode/input"]
    return float(scales[node.input[1]])


@pytest.mark.parametrize("method", ["MinMax", "auto"])
def test_a_run_takes_them_in_by_default(tmp_path: Path, method: str) -> None:
    source = growing(tmp_path)
    config = QConfig(QLayerConfig(UInt8Spec(calibration_method=method), Int8Spec()))
    for steps, name in ((0, "none"), (None, "default")):
        reader = TextReader(source, samples=2, seq_len=LENGTH, decode_steps=steps)
        ModelQuantizer(config).quantize_model(source, tmp_path / name / "model.onnx", reader, check=None)
    ratio = down_scale(tmp_path / "default" / "model.onnx") / down_scale(tmp_path / "none" / "model.onnx")
    # Ten times the values of a tenth of the tokens, whose largest need not be the window's.
    assert 2 < ratio < 10.01


def test_readers_of_others_are_used_as_they_are(tmp_path: Path) -> None:
    path = exports.optimum_export("llama")
    reader = TextReader(path, samples=1, seq_len=LENGTH)

    class Own:
        decode_steps = 4

        def get_next(self) -> None:
            return None

    np.savez(tmp_path / "ids.npz", input_ids=reader.token_windows)
    assert wrap(reader).decode_steps is None
    assert wrap(TokenReader(reader.inputs, reader.token_windows, decode_steps=2)).decode_steps == 2
    for other in (Own(), SampleReader(list(reader)), NpzReader(tmp_path / "ids.npz", reader.inputs)):
        assert wrap(other).decode_steps == 0


def notes_of(source: Path, folder: Path, config: QConfig, steps: int | None) -> str:
    quantizer = ModelQuantizer(config)
    reader = TextReader(source, samples=2, seq_len=16, decode_steps=steps)
    quantizer.quantize_model(source, folder / "out" / "model.onnx", reader, check=None)
    assert quantizer.outcome is not None
    return " ".join(quantizer.outcome.notes)


def test_a_graph_without_a_cache_is_told_of_where_steps_were_asked_for(tmp_path: Path) -> None:
    source = exports.dynamo_export("llama")
    assert "decode" not in notes_of(source, tmp_path, QConfig(STATIC), None)
    assert "no cache: no decode step is calibrated on, not 3" in notes_of(source, tmp_path, QConfig(STATIC), 3)


def test_fixed_lengths_are_told_of(tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    model = model_io.load(source)
    for value in model.graph.inputs:
        if value.name.startswith("past"):
            value.shape = ir.Shape([*value.shape[:2], 0, value.shape[3]])
    fixed = tmp_path / "in" / "model.onnx"
    model_io.save(model, fixed, companions_from=source.parent)
    inputs = ModelInputs.from_path(fixed)
    assert not inputs.has_cache
    model = model_io.load(source)
    model.graph.inputs[0].shape = ir.Shape([1, 16])
    model_io.save(model, fixed, companions_from=source.parent)
    assert find_decoding(model_io.load(fixed), fixed.parent, None)[1] == (
        "the graph fixes its lengths: no decode step is calibrated on beside the windows",
    )
    assert find_decoding(model_io.load(fixed), fixed.parent, 0) == (None, ())


def test_steps_without_a_fixed_scale_are_told_of(tmp_path: Path) -> None:
    per_token = UInt8Spec(symmetric=True, quant_granularity="Token")
    config = QConfig(QLayerConfig(per_token, Int8Spec()))
    source = exports.optimum_export("llama")
    assert "no activation has a fixed scale: 3 decode steps not used" in notes_of(source, tmp_path, config, 3)
    assert "decode" not in notes_of(source, tmp_path, config, None)


def test_fewer_than_none_are_refused() -> None:
    with pytest.raises(CalibrationError, match="decode_steps -1: ask for 0 or more"):
        TextReader(exports.optimum_export("llama"), samples=1, seq_len=8, decode_steps=-1)


@pytest.mark.parametrize("steps", [0, 1])
def test_from_the_command_line(capfd: pytest.CaptureFixture[str], tmp_path: Path, steps: int) -> None:
    source = growing(tmp_path)
    few = ("--calib-samples", 1, "--calib-seq-len", LENGTH, "--calib-decode-steps", steps)
    target = tmp_path / "out" / "model.onnx"
    Shell(capfd).ok("quantize", source, target, "--scheme", "w8a8-static", "--no-rotate", "--no-check", *few)
    ids = TextReader(source, samples=1, seq_len=LENGTH)
    name = "decode/input"
    found = collect_ranges(source, [name], ids, decoding=decoding_of(source, steps) if steps else None)[name]
    expected = (max(found.max, 0) - min(found.min, 0)) / 255
    assert down_scale(target) == pytest.approx(expected, rel=1e-5)
