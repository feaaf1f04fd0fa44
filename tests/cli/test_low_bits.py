"""``quantize`` with numbers of bits: what reaches the pipeline, and what is refused before it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import linear_graphs as graphs
import numpy as np
import onnx
import pytest
from command_line import Shell
from onnx import helper
from passed import Asks

from quarot_onnx.cli import quantizing
from quarot_onnx.config import GPTAQConfig, GPTQConfig, QronosConfig, RTNConfig
from quarot_onnx.config.choices import Scheme
from quarot_onnx.errors import OutputError
from quarot_onnx.pipeline import Outcome
from quarot_onnx.recipes import loading
from quarot_onnx.recipes.loading import load, shipped

HEAD = "/lm_head/MatMul"
DOWN = "/model/layers.0/mlp/down_proj/MatMul"
QUERY = "/model/layers.0/self_attn/q_proj/MatMul"


@pytest.mark.parametrize(
    ("options", "rounding"),
    [
        ("--w-bits 4", QronosConfig()),
        ("--w-bits 7 --alpha 1 --percdamp 0.3", QronosConfig(alpha=1.0, perc_damp=0.3)),
        ("--w-bits 4 --alpha 0", QronosConfig(alpha=0.0)),
        ("--weights gptq", GPTQConfig()),
        ("--w-bits 8", RTNConfig()),
        ("--w-bits 8 --weights qronos", QronosConfig()),
        ("--w-bits 4 --w-rtn", RTNConfig()),
        ("--w-bits 4 --w-rtn --weights rtn --no-w-clip", RTNConfig(mse=False)),
        ("--w-bits 3 --use-v2", GPTAQConfig()),
        ("--weights gptq --asym-calibrate --alpha 0.5", GPTAQConfig(alpha=0.5)),
        ("--weights gptaq --use-v2 --no-enable-aq-calibration", GPTAQConfig(enable_aq_calibration=False)),
        ("--weights gptq --a-bits 8 --enable-aq-calibration", GPTQConfig(enable_aq_calibration=True)),
        (
            "--weights gptq --percdamp 0.1 --act-order --static-groups --gptq-block-size 64 --w-groupsize 32 --w-clip",
            GPTQConfig(perc_damp=0.1, act_order=True, static_groups=True, block_size=64),
        ),
    ],
    ids=str,
)
def test_roundings(asks: Asks, options: str, rounding: object) -> None:
    passed = asks(*options.split(), "--calib-samples", 1, "--calib-seq-len", 16)
    assert passed.config.rounding == rounding
    assert (passed.reader is not None) == (not isinstance(rounding, RTNConfig))
    # Nothing was said of the text, and statistics of another text are worth less.
    assert ("text that the model wrote" in passed.notes) == (passed.reader is not None)


def test_a_text_of_the_users_own_needs_no_note(asks: Asks, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The wind went round the house, and nobody in it slept. " * 9, encoding="utf-8")
    passed = asks("--weights", "gptq", "--calib-text", text, "--calib-samples", 1, "--calib-seq-len", 16)
    assert passed.reader is not None
    assert "documentation" not in passed.notes


@pytest.mark.parametrize(
    ("options", "weight", "activation"),
    [
        ("--w-bits 4", ("Int4", True, "Channel", None), None),
        ("--w-bits 2 --w-asym --w-groupsize 16", ("UInt2", False, "Group", 16), None),
        ("--w-bits 3 --w-groupsize -1 --w-sym", ("Int3", True, "Channel", None), None),
        ("--w-bits 8 --w-asym --per-tensor", ("Int8", False, "Tensor", None), None),
        ("--w-bits 8 --a-bits 8", ("UInt8", True, "Channel", None), ("UInt8", True, None, 1.0)),
        ("--w-bits 8 --a-bits 8 --weight-type int8", ("Int8", True, "Channel", None), ("UInt8", True, None, 1.0)),
        ("--w-bits 7 --a-bits 8", ("Int7", True, "Channel", None), ("UInt8", True, None, 1.0)),
        ("--w-bits 5 --w-asym --a-bits 8", ("UInt5", False, "Channel", None), ("UInt8", True, None, 1.0)),
        ("--weights rtn --a-bits 16", ("Int4", True, "Channel", None), None),
        ("--w-bits 4 --a-bits 8", ("Int4", True, "Channel", None), ("UInt8", True, None, 1.0)),
        (
            "--w-bits 4 --a-bits 4 --a-asym --a-groupsize 16 --a-clip-ratio 0.9",
            ("Int4", True, "Channel", None),
            ("UInt4", False, 16, 0.9),
        ),
    ],
    ids=str,
)
def test_grids(asks: Asks, options: str, weight: tuple[Any, ...], activation: tuple[Any, ...] | None) -> None:
    layer = asks(*options.split(), *([] if "rtn" in options else ["--w-rtn"])).layer
    spec = layer.weight
    assert (spec.data_type.name, spec.symmetric, spec.quant_granularity.name, spec.group_size) == weight
    found = layer.activation
    if activation is None:
        assert found is None
    else:
        assert found is not None
        assert found.quant_granularity.name == "Token"
        assert (found.data_type.name, found.symmetric, found.group_size, found.clip_ratio) == activation


@pytest.mark.parametrize(
    ("options", "written", "level"),
    [
        ("--w-bits 4", "nbits", None),
        ("--w-bits 4 --accuracy-level 4", "nbits", 4),
        ("--w-bits 4 --a-bits 8", "w4a8", None),
        ("--w-bits 4 --a-bits 8 --format fake", "fake", None),
        ("--w-bits 8 --a-bits 8", "w8", None),
        ("--w-bits 8 --format w8", "w8", None),
        ("--w-bits 4 --a-bits 4", "fake", None),
    ],
    ids=str,
)
def test_formats(asks: Asks, options: str, written: str, level: int | None) -> None:
    passed = asks(*options.split(), "--w-rtn")
    assert (passed.config.resolved_format, passed.config.accuracy_level) == (written, level)
    assert ("the head stays in float; --lm-head int8" in passed.notes) == (written != "fake")


@pytest.mark.parametrize("options", ["--w-bits 16 --a-bits 4 --a-asym", "--a-bits 4 --a-asym --format fake"])
def test_activations_alone(asks: Asks, options: str) -> None:
    passed = asks(*options.split(), "--int8-down-proj")
    layer, config = passed.layer, passed.config
    assert layer.weight is None
    assert layer.activation is not None
    assert (layer.activation.data_type.name, layer.activation.symmetric) == ("UInt4", False)
    assert (config.resolved_format, config.rounding, passed.reader) == ("fake", None, None)
    assert config.quarot is not None
    assert config.exclude == (HEAD,)
    down = config.layer_config_for(DOWN, "MatMul")
    assert down is not None
    assert down.weight is None
    assert down.activation is not None
    assert down.activation.bits == 8
    said = "the format fake was chosen, as weights stay in float" in passed.notes
    assert said == ("--format" not in options)


def test_head_embedding_and_down_projections_are_found_by_structure(asks: Asks) -> None:
    plain = asks("--w-bits", 4, "--w-rtn", "--exclude", QUERY).config
    assert plain.exclude == (HEAD, QUERY)
    assert plain.layer_config_for(DOWN, "MatMul") == plain.global_config
    assert plain.layer_config_for("x", "Gather") is None
    more = ("--lm-head", "int8", "--embedding", "int4", "--int8-down-proj")
    passed = asks("--w-bits", 4, "--a-bits", 8, "--w-rtn", *more)
    assert "head stays" not in passed.notes
    bits = {name: passed.config.layer_config_for(name, "MatMul").weight.bits for name in (HEAD, DOWN, QUERY)}  # type: ignore[union-attr]
    assert bits == {HEAD: 8, DOWN: 8, QUERY: 4}
    table = passed.config.layer_config_for("x", "Gather")
    assert table is not None
    assert table.weight.described() == "Int4Spec(group_size=64)"
    assert "head stays" not in asks("--w-bits", 4, "--w-rtn", "--lm-head", "float").notes


def test_rotation_options_arrive(asks: Asks) -> None:
    quarot = asks("--w-bits", 4, "--w-rtn", "--random-had", "--seed", 3, "--no-r2", "--block-size", 32).config.quarot
    assert quarot is not None
    assert (quarot.use_random_had, quarot.seed, quarot.r2, quarot.r4, quarot.block_size) == (True, 3, False, None, 32)
    assert asks("--w-bits", 4, "--w-rtn", "--seed", 3).config.quarot is not None
    assert asks("--w-bits", 4, "--w-rtn", "--seed", 3, "--no-rotate").config.quarot is None


def test_calibration_options(asks: Asks, text: Path) -> None:
    passed = asks("--w-bits", 4, "--calib-text", text, "--nsamples", 3, "--calib-seq-len", 20, "--calib-own", 0)
    assert passed.reader is not None
    assert passed.reader.token_windows.shape == (3, 20)
    assert "calib-text" not in passed.notes
    assert "not used" not in passed.notes
    assert asks("--w-bits", 4, "--calib-samples", 2).reader.token_windows.shape == (2, 128)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--calib-text a.txt", "--calib-text"),
        ("--nsamples 4", "--nsamples"),
        ("--calib-samples 4 --calib-seq-len 32", "--calib-samples and --calib-seq-len"),
        ("--tokenizer b --calib-seq-len 32 --calib-text a.txt", "--calib-text, --tokenizer and --calib-seq-len"),
    ],
)
@pytest.mark.parametrize("scheme", ["--w-bits 8", "--scheme w8", "--config q.yaml"])
def test_calibration_options_without_calibration(
    asks: Asks, tmp_path: Path, scheme: str, options: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("q.yaml").write_text("global_config: {weight: Int8}\n")
    passed = asks(*scheme.split(), *options.split(), "--no-check")
    assert passed.reader is None
    assert f"note: nothing is calibrated: {words} not used\n" in passed.notes
    assert passed.notes.count("not used") == 1


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("weights: {bits: 8}\ncalibration: {text: no.txt, samples: 4}\n", "calibration.text"),
        ("weights: {bits: 8}\ncalibration: {own: 2}\n", "calibration.own"),
        (
            "calib: {path: is.txt}\nquant: {method: RTN, weight: {bit: 8, symmetric: on, granularity: per_channel}}\n",
            "calib.path",
        ),
    ],
)
def test_a_text_that_a_recipe_names_in_vain(
    asks: Asks, tmp_path: Path, content: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("is.txt").write_text("A text.")
    Path("r.yaml").write_text(content)
    passed = asks("--recipe", "r.yaml", "--no-check")
    assert passed.reader is None
    assert f"note: nothing is calibrated: r.yaml: {key} not used\n" in passed.notes
    Path("r.yaml").write_text("weights: {bits: 8}\ncalibration: {samples: 4, seq_len: 32}\n")
    assert "not used" not in asks("--recipe", "r.yaml", "--no-check").notes


def test_two_names_of_one_option(asks: Asks, refused_early: Callable[..., str]) -> None:
    passed = asks("--w-bits", 4, "--nsamples", 2, "--calib-samples", 2)
    assert passed.reader is not None
    assert passed.reader.token_windows.shape == (2, 128)
    line = refused_early("--w-bits", 4, "--nsamples", 2, "--calib-samples", 3)
    assert "--nsamples 2 contradicts --calib-samples 3; leave out one" in line


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--w-bits 4 --w-rtn", "seed has no effect: no Hadamard is random; add use_random_had (on the command line"),
        ("--scheme w8", "seed has no effect: no Hadamard is random; add use_random_had (on the command line"),
        ("--recipe r.yaml", "seed has no effect: no Hadamard is random; add use_random_had (on the command line"),
        ("--scheme w8 --no-rotate", "--seed 3 has no effect: nothing is rotated"),
        ("--w-bits 4 --w-rtn --no-rotate", "--seed 3 has no effect: nothing is rotated"),
        ("--config q.yaml", "--seed 3 has no effect: q.yaml says what is rotated, and how"),
        ("--scheme w8 --random-had", None),
        ("--w-bits 8 --random-had", None),
    ],
)
def test_a_seed_that_does_nothing_is_told(
    asks: Asks, tmp_path: Path, options: str, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("q.yaml").write_text("global_config: {weight: Int8}\nalgo_config: [{name: quarot}]\n")
    Path("r.yaml").write_text("rotation: {r1: true}\nweights: {bits: 8}\n")
    notes = [line for line in asks(*options.split(), "--seed", 3).notes.splitlines() if "no effect" in line]
    assert len(notes) == (why is not None)
    assert why is None or notes[0].startswith(f"note: {why}")


@pytest.mark.parametrize(
    ("options", "said", "way_out"),
    [
        ("--w-bits 9", "--w-bits 9: weights have 2 to 8 bits, or 16", "16"),
        ("--w-bits 4 --a-bits 1", "--a-bits 1: activations have 2 to 8 bits", "16"),
        ("--w-bits 16", "--w-bits 16: with 16 bits for weights and activations there is nothing", "--w-bits 8"),
        ("--w-bits 16 --a-bits 16", "--w-bits 16: with 16 bits for weights and activations there is", "--w-bits 8"),
        ("--w-bits 16 --a-bits 4 --weights gptq", "--weights gptq: weights of 16 bits stay in float", "--w-bits 8"),
        ("--w-bits 16 --a-bits 4 --w-rtn", "--w-rtn: weights of 16 bits stay in float", "--w-bits 8"),
        ("--a-bits 4 --w-groupsize 32", "--w-groupsize 32: weights of 16 bits stay in float", "--w-bits 8"),
        (
            "--a-bits 4 --format w4a8",
            "--format w4a8: w4a8 does not hold activations beside weights in float",
            "--format fake",
        ),
        (
            "--a-bits 4 --format nbits",
            "--format nbits: nbits does not hold activations beside weights in float",
            "--format fake",
        ),
        ("--a-bits 8 --int8-down-proj", "--int8-down-proj: all inputs have 8 bits", "leave it out"),
        ("--w-bits 16 --weights gptq", "--weights gptq: weights of 16 bits stay in float", "--w-bits 8"),
        ("--weights rtn --act-order", "--act-order: not for rounding to nearest (rtn)", "--weights gptq"),
        ("--w-bits 8 --percdamp 0.1", "--percdamp 0.1: not for rounding to nearest", "--weights gptq"),
        ("--w-rtn --w-bits 4 --gptq-block-size 8", "--gptq-block-size 8: not for rounding to nearest", "--weights"),
        ("--weights rtn --enable-aq-calibration", "--enable-aq-calibration: not for", "--weights gptq"),
        ("--weights gptq --alpha 1", "--alpha 1.0: only gptaq and qronos have it", "--weights qronos"),
        ("--weights gptq --alpha 0", "--alpha 0.0: only gptaq and qronos have it", "--weights qronos"),
        ("--weights rtn --no-enable-aq-calibration", "--no-enable-aq-calibration: not for", "--weights gptq"),
        ("--w-bits 4 --percdamp 0", "--percdamp 0.0: ", "greater than 0"),
        ("--w-bits 4 --w-groupsize 1", "--w-groupsize 1: a group has 2 or more", "-1"),
        ("--w-bits 4 --w-groupsize 0", "--w-groupsize 0: a group has 2 or more", "use -1, or leave it out"),
        ("--w-bits 4 --w-groupsize 7", "--w-groupsize 7 does not divide the 64 input features of '/", "16 or 32 or 64"),
        ("--w-bits 4 --a-bits 4 --a-groupsize 24", "--a-groupsize 24 does not divide the 64", "16 or 32 or 64"),
        ("--w-bits 4 --w-groupsize 16 --act-order", "--act-order: with groups of 16", "use --static-groups"),
        ("--w-bits 4 --w-groupsize 16 --per-tensor", "--per-tensor: groups of 16 lie within channels", "leave it out"),
        ("--w-bits 4 --w-groupsize 48 --format nbits", "--w-groupsize 48: nbits has groups of 16", "--format fake"),
        ("--w-bits 4 --a-asym", "--a-asym: activations stay in float", "--a-bits 8"),
        ("--w-bits 4 --a-clip-ratio 0.9", "--a-clip-ratio 0.9: activations stay in float", "--a-bits 8"),
        ("--w-bits 4 --a-bits 8 --a-asym --format w4a8", "--a-asym: w4a8 has symmetric", "--format fake"),
        ("--w-bits 4 --a-bits 8 --accuracy-level 4", "--accuracy-level 4: only nbits", "--a-bits 16"),
        ("--w-bits 4 --format w4a8", "--format w4a8: w4a8 needs 8-bit activations", "--a-bits 8"),
        ("--w-bits 8 --int8-down-proj", "--int8-down-proj: all Linears have 8 bits", "leave it out"),
        ("--w-rtn --weights gptq", "--w-rtn is rtn and contradicts --weights gptq", "leave out one"),
        ("--use-v2 --weights qronos", "--use-v2 is gptaq and contradicts --weights qronos", "leave out one"),
        ("--asym-calibrate --w-rtn", "contradicts --w-rtn", "leave out one"),
        (
            "--weights gptq --enable-aq-calibration --no-enable-aq-calibration",
            "--enable-aq-calibration contradicts --no-enable-aq-calibration",
            "leave out one",
        ),
        ("--scheme w8 --w-bits 4", "--scheme w8 contradicts --w-bits 4", "leave out one"),
        ("--w-bits 4 --percentile 99", "--percentile 99.0: activations stay in float", "granularity: tensor"),
        ("--percdamp 0.1", "--percdamp 0.1 goes with numbers of bits", "--w-bits"),
        ("--format fake", "--format fake goes with numbers of bits", "--w-bits"),
        ("--scheme w8a8-static --accuracy-level 1", "goes with activations in float", "give --w-bits 8 in its place"),
        ("--scheme w8a16-static --format nbits", "goes with activations in float", "or leave --format out"),
        ("--scheme w4a16-static --weight-type uint8", "no weight has 8 bits", "use --scheme w8a8-dynamic"),
        ("--scheme w4a16-static --lm-head int4", "with a fixed scale, which these have not", "--lm-head int8"),
        ("--int8-down-proj --scheme w8", "--int8-down-proj: all Linears of --scheme w8 have 8 bits", "leave it out"),
        ("--int8-down-proj --scheme w8a8-static", "--int8-down-proj: all Linears of --scheme w8a8-static", "leave it"),
        ("--lm-head int4", "--lm-head int4: qdq holds weights of 8 bits", "int8"),
        ("--w-bits 4 --no-rotate --r1", "--r1 contradicts --no-rotate", "leave out one"),
        ("--w-bits 4 --config q.json", "--w-bits 4 and --config say the same thing twice", "q.json"),
        ("--recipe r.yaml --config q.json", "--recipe and --config say the same thing twice", "q.json"),
        ("--w-bits 4 --weights awq", "'awq'", "gptaq"),
        ("--scheme w4a8 --w-bits 3", "--scheme w4a8 contradicts --w-bits 3", "leave out one"),
        ("--scheme w8 --recipe w8", "--scheme w8 contradicts --recipe", "leave out one"),
        ("--scheme w8a8-dynamic --weights gptq", "contradicts --weights gptq", "leave out one"),
        ("--scheme w8 --a-sym", "--a-sym: activations stay in float", "--scheme w8a8-dynamic"),
        ("--scheme w8 --calib-method minmax", "--calib-method minmax: activations stay in float", "w8a8-static"),
        ("--calib-method percentile", "--calib-method percentile: scales per token", "--scheme w8a8-static"),
        ("--scheme w8a8-static --percentile 99.9", "--percentile 99.9: add", "--calib-method percentile"),
        ("--scheme w8a8-dynamic --a-asym", "--a-asym: qdq has symmetric", "--scheme w8a8-static"),
        ("--recipe w4a9", "--recipe w4a9 is neither", "(did you mean 'w4a8'?); name a file, or one of w8a8-dynamic"),
        ("--recipe w4a8 --w-bits 4", "--recipe w4a8 contradicts --w-bits 4", "leave out one"),
        ("--scheme w4a16 --format w4a8", "--format w4a8: w4a8 needs 8-bit activations", "use --scheme w4a8"),
        ("--scheme w4a8 --format nbits", "--format nbits: nbits leaves activations in float", "use --scheme w4a16"),
        ("--scheme w4-block --format w4a8", "the scheme w4-block: w4a8 has a scale per channel", "--format nbits"),
        ("--scheme w4a16 --a-sym", "--a-sym: activations stay in float", "use --scheme w4a8"),
        ("--w-bits 8 --a-bits 4 --format qdq", "--a-bits 4: qdq has activations of 8 bits", "use --format fake"),
        ("--w-bits 8 --a-bits 8 --a-groupsize 16 --format qdq", "--a-groupsize 16: qdq has one scale", "--format fake"),
        (
            "--w-bits 8 --a-bits 8 --percentile 99",
            "--percentile 99.0: scales per token",
            "granularity: tensor in a recipe",
        ),
        ("--w-bits 4 --format qdq", "--format qdq: qdq holds weights of 8 bits, and of 4 beside", "use --format nbits"),
        ("--w-bits 8 --format qdq --lm-head int4", "--lm-head int4: qdq holds weights of 8 bits", "use --lm-head int8"),
    ],
    ids=str,
)
def test_refusals_name_the_option_and_the_way_out(
    refused_early: Callable[..., str], options: str, said: str, way_out: str
) -> None:
    line = refused_early(*options.split())
    assert said in line
    assert way_out in line


def test_what_an_interrupted_run_keeps_is_told(
    shell: Shell, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> Outcome:
        error = OutputError("no space is left")
        error.add_note("finished blocks are kept in here")
        raise error

    monkeypatch.setattr(quantizing, "quantize", full)
    result = shell("quantize", model, tmp_path / "out.onnx", "--w-bits", 4, "--w-rtn")
    assert result.status == 2
    assert result.err.splitlines() == ["note: finished blocks are kept in here", "error: no space is left"]


@pytest.mark.parametrize(
    ("scheme", "written", "method"),
    [("w4a8", "w4a8", "qronos"), ("w4a16", "nbits", "qronos"), ("w4-block", "nbits", "qronos")],
)
def test_low_bits_in_one_word(asks: Asks, scheme: str, written: str, method: str) -> None:
    """The same by --scheme, which options may change, and by --recipe."""
    passed, by_recipe = asks("--scheme", scheme), asks("--recipe", scheme)
    assert passed.config == by_recipe.config
    config, rounding = passed.config, passed.config.rounding
    assert rounding is not None
    assert (config.resolved_format, rounding.name) == (written, method)
    assert config.quarot is not None
    head = config.layer_config_for(HEAD, "MatMul")
    assert head is not None
    assert head.weight is not None
    assert head.weight.bits == 8
    other = asks("--scheme", scheme, "--weights", "rtn", "--lm-head", "float", "--no-rotate").config
    assert (other.rounding and other.rounding.name, other.quarot) == ("rtn", None)
    assert other.layer_config_for(HEAD, "MatMul") is None


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-static", "w8"])
def test_plain_8_bits_by_name_of_the_recipe(asks: Asks, scheme: str) -> None:
    passed = asks("--scheme", scheme).config
    assert passed == asks("--recipe", scheme).config
    assert (passed.resolved_format, passed.rounding, passed.low_bit) == ("qdq", None, False)


def test_every_scheme_is_shipped_and_no_other() -> None:
    folder = Path(loading.__file__).with_name("shipped")
    assert {path.stem for path in folder.iterdir()} == set(Scheme)
    for scheme in Scheme:
        assert load(Path(scheme)).data == shipped(scheme)


def test_a_name_of_a_scheme_is_never_a_folder(asks: Asks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README writes to w4a8/model.onnx; the next run may name the recipe w4a8."""
    (tmp_path / "w4a8").mkdir()
    monkeypatch.chdir(tmp_path)
    assert asks("--recipe", "w4a8").config == asks("--scheme", "w4a8").config


def test_options_change_a_recipe_that_is_named(asks: Asks) -> None:
    assert (
        asks("--recipe", "w4a8", "--lm-head", "float").config == asks("--scheme", "w4a8", "--lm-head", "float").config
    )
    assert asks("--recipe", "w8", "--no-rotate", "--format", "qdq").config.quarot is None


def test_a_scheme_asks_for_no_head_where_there_is_none(asks: Asks, tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "W"], ["y"], name="only")]
    source = tmp_path / "linear.onnx"
    onnx.save(graphs.model(nodes, {"x": ["n", 24]}, {"y": ["n", 16]}, {"W": np.ones((24, 16), np.float32)}), source)
    config = asks("--scheme", "w4a8", "--no-rotate", "--weights", "rtn", source=source).config
    assert config.resolved_format == "w4a8"
    assert config.layer_config_for("only", "MatMul") is not None


def test_plain_8_bits_keep_their_format_beside_a_clip_ratio(asks: Asks) -> None:
    plain = asks(*["--w-bits", "8", "--a-bits", "8", "--format", "qdq", "--no-w-clip", "--a-clip-ratio", "0.9"]).config
    assert (plain.resolved_format, plain.rounding, plain.low_bit) == ("qdq", None, False)
