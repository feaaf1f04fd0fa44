"""The quantized model beside the original: as a part of ``quantize``, as a gate, and as a command of its own."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Shell, files
from onnx import numpy_helper

from quarot_onnx import processor
from quarot_onnx.cli import quantizing
from quarot_onnx.graph.saturation import saturable_products
from quarot_onnx.io import model_io

KEYS = {
    "kl", "top1_agreement", "perplexity_a", "perplexity_b", "perplexity_ratio", "exact_perplexity_ratio", "passed",
}  # fmt: skip
CALIBRATION = ("--calib-samples", 8, "--calib-seq-len", 32)


def damaged(path: Path, factor: float = 1.5) -> Path:
    """A copy with the scales of one weight multiplied."""
    made = onnx.load(path)
    tensor = next(t for t in made.graph.initializer if t.name.endswith("_scale") and len(t.dims) == 1)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    onnx.save(made, path.with_name("damaged.onnx"))
    return path.with_name("damaged.onnx")


def test_quantize_checks_what_it_wrote(shell: Shell, model: Path, tmp_path: Path) -> None:
    done = shell.ok("quantize", model, tmp_path / "q" / "q.onnx", "--json").json
    assert done["check"].keys() >= KEYS
    assert done["check"]["tokens"] == 512
    assert done["check"]["decode_steps"] > 0
    assert done["seconds"]["check"] > 0
    report = json.loads((tmp_path / "q" / "q.quarot.json").read_text())
    assert report["check"] == done["check"]
    line = shell.ok("quantize", model, tmp_path / "q" / "q.onnx", "--check-tokens", 64).out
    assert "checked: perplexity" in line
    assert "64 tokens of Python's documentation" in line
    off = shell.ok("quantize", model, tmp_path / "q" / "q.onnx", "--no-check", "--json").json
    assert off["check"] is None
    assert "check" not in json.loads((tmp_path / "q" / "q.quarot.json").read_text())


@pytest.mark.parametrize("gate", [("--max-ppl-ratio", 0.5), ("--max-kl", 0)])
def test_a_broken_limit_leaves_nothing(gate: tuple[str, float], shell: Shell, model: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    message = shell.fails("quantize", model, tmp_path / "q", *gate, status=1)
    assert "allowed" in message
    assert files(tmp_path) == before
    shell.ok("quantize", model, tmp_path / "q", "--no-check")
    kept = files(tmp_path / "q")
    shell.fails("quantize", model, tmp_path / "q", *gate, status=1)
    assert files(tmp_path / "q") == kept, "what an earlier run wrote is still there"


def test_compare_finds_damage(shell: Shell, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "q" / "q.onnx"
    shell.ok("quantize", model, out, "--no-check")
    sound = shell.ok("compare", model, out, "--max-ppl-ratio", 1.02, "--max-kl", 0.05, "--tokens", 600, "--json").json
    assert sound.keys() >= KEYS
    assert sound["passed"]
    assert sound["tokens"] >= 600
    result = shell("compare", model, damaged(out, 20), "--max-kl", 2 * sound["kl"], "--json")
    assert result.status == 1
    assert not result.json["passed"]
    assert "error: the quantized model is too far" in result.err
    table = shell.ok("compare", model, out, "--tokens", 64).out
    for word in ("ratio", "KL", "processor", "Python's documentation"):
        assert word in table


def test_compare_on_a_text(shell: Shell, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words to read, and some more of them. " * 20)
    found = shell.ok("compare", model, model, "--text", tmp_path / "text.txt", "--tokens", 256, "--json").json
    assert (found["text"], found["perplexity_ratio"]) == (str(tmp_path / "text.txt"), 1)
    message = shell.fails("compare", model, model, "--text", tmp_path / "text.txt", "--tokens", 4096)
    assert "there are" in message


@pytest.mark.parametrize(
    "option", [("--check-tokens", 64), ("--check-text", "t.txt"), ("--max-kl", 1), ("--max-ppl-ratio", 1)]
)
def test_no_check_and_a_check(option: tuple[str, object], shell: Shell, model: Path, tmp_path: Path) -> None:
    message = shell.fails("quantize", model, tmp_path / "q.onnx", "--no-check", *option)
    assert f"{option[0]} contradicts --no-check" in message


@pytest.mark.parametrize("option", ["--max-kl", "--max-ppl-ratio"])
def test_a_limit_that_is_none(option: str, shell: Shell, model: Path, tmp_path: Path) -> None:
    for command in (("compare", model, model), ("quantize", model, tmp_path / "q.onnx")):
        assert f"{option} inf is no limit: give a finite number" in shell.fails(*command, option, "inf")
        assert f"Invalid value for '{option}'" in shell.fails(*command, option, "nan")


def test_limits_without_a_tokenizer(shell: Shell, model: Path, tmp_path: Path) -> None:
    (model.parent / "tokenizer.json").unlink()
    message = shell.fails("quantize", model, tmp_path / "q.onnx", "--max-ppl-ratio", 1.1)
    assert "tokenizer.json" in message
    line = shell.ok("quantize", model, tmp_path / "q.onnx", "--max-kl", 1).out
    assert "tokens of random ids" in line


EIGHT = ("--w-bits", 8, "--a-bits", 8)
FOUR = ("--w-bits", 4, "--a-bits", 8, "--weights", "rtn")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--w-asym",),
        ("--per-tensor",),
        ("--embedding", "int8"),
        ("--scheme", "w8a8-static", *CALIBRATION),
        ("--scheme", "w8a8-static", "--w-asym", "--per-tensor", "--lm-head", "int8", *CALIBRATION),
        ("--scheme", "w8"),
        EIGHT,
        (*EIGHT, "--w-asym"),
        (*EIGHT, "--per-tensor", "--lm-head", "int8"),
        (*EIGHT, "--weights", "gptq", *CALIBRATION),
        ("--w-bits", 7, "--a-bits", 8),
        ("--w-bits", 7, "--a-bits", 8, "--w-asym", "--lm-head", "int8"),
        ("--w-bits", 6, "--a-bits", 8, "--w-asym"),
        ("--w-bits", 5, "--a-bits", 8, "--w-asym"),
        FOUR,
        (*FOUR, "--w-asym", "--lm-head", "int8"),
        (*FOUR, "--int8-down-proj", "--lm-head", "int8", "--embedding", "int8"),
        (*FOUR, "--format", "w8", "--w-asym"),
        ("--w-bits", 8, "--lm-head", "int8"),
    ],
)
def test_no_product_saturates(options: tuple[object, ...], shell: Shell, model: Path, tmp_path: Path) -> None:
    """What the command line writes is right on every processor, unless int8 is asked for."""
    shell.ok("quantize", model, tmp_path / "q.onnx", "--no-check", "--no-verify", *options)
    assert not saturable_products(model_io.load(tmp_path / "q.onnx"))


@pytest.mark.parametrize(
    "options",
    [(), ("--scheme", "w8a8-static", *CALIBRATION), EIGHT, (*FOUR, "--lm-head", "int8"), (*FOUR, "--int8-down-proj")],
)
def test_int8_is_written_where_it_is_asked_for(
    options: tuple[object, ...], shell: Shell, model: Path, tmp_path: Path
) -> None:
    """And the user is told, onnxruntime-genai is set to exact products, and the figures are the uint8 model's."""
    (model.parent / "genai_config.json").write_text('{"model": {"decoder": {"filename": "model.onnx"}}}')
    result = shell(
        "quantize", model, tmp_path / "i" / "q.onnx", "--weight-type", "int8", "--json", "--no-verify", *options
    )
    assert result.status == 0, result.err
    assert saturable_products(model_io.load(tmp_path / "i" / "q.onnx"))
    assert "without VNNI" in result.err
    genai = json.loads((tmp_path / "i" / "genai_config.json").read_text())
    assert genai["model"]["decoder"] == {
        "filename": "q.onnx", "session_options": {processor.EXACT_PRODUCTS: "1"},
    }  # fmt: skip
    other = shell("quantize", model, tmp_path / "u" / "q.onnx", "--json", "--no-verify", *options)
    assert "VNNI" not in other.err.replace("this one, without VNNI", "")
    genai = json.loads((tmp_path / "u" / "genai_config.json").read_text())
    assert genai["model"]["decoder"] == {"filename": "q.onnx"}
    ours, exact = other.json["check"], result.json["check"]["exact_perplexity_ratio"]
    assert exact == pytest.approx(ours["perplexity_ratio"], rel=1e-5), "the same grid, moved by 128"
    assert (result.json["check"]["saturating_products"] > 0) == processor.saturates()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--w-bits", 4, "--a-bits", 8), "no weight has 8 bits"),
        (("--w-bits", 8), "beside 8-bit activations alone"),
        ((*EIGHT, "--format", "fake"), "beside 8-bit activations alone"),
    ],
)
def test_a_type_that_would_change_nothing(
    options: tuple[object, ...], words: str, shell: Shell, model: Path, tmp_path: Path
) -> None:
    message = shell.fails("quantize", model, tmp_path / "q.onnx", "--weight-type", "uint8", *options)
    assert message.startswith("error: --weight-type uint8: ")
    assert words in message


def test_inspect_tells_of_a_quantized_model(shell: Shell, model: Path, tmp_path: Path) -> None:
    shell.ok("quantize", model, tmp_path / "q.onnx", "--weight-type", "int8", "--no-check")
    found = shell.ok("inspect", tmp_path / "q.onnx", "--json").json
    assert found["saturating_products"] == found["recipe"]["quantization"]["linears"]
    assert found["processor_saturates"] == processor.saturates()
    assert found["quantized"]["DequantizeLinear"] > 0
    text = shell.ok("inspect", tmp_path / "q.onnx").out
    assert "R1 at 5" in text
    assert (processor.EXACT_PRODUCTS in text) == processor.saturates()
    assert "already quantized" in shell.fails("inspect", tmp_path / "q.onnx", "--write-config", tmp_path / "c.json")


def test_evaluate_tells_of_products_that_saturate(shell: Shell, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words to read, and some more of them. " * 20)
    shell.ok("quantize", model, tmp_path / "q" / "q.onnx", "--weight-type", "int8", "--no-check")
    given = ("evaluate", tmp_path / "q" / "q.onnx", "--text", tmp_path / "text.txt", "--seq-len", 64, "--windows", 4)
    fast, exact = shell.ok(*given, "--json").json, shell.ok(*given, "--exact", "--json").json
    assert (fast["saturating_products"] > 0) == processor.saturates()
    assert (fast["exact"], exact["exact"]) == (False, True)
    assert ("--exact" in shell.ok(*given).out) == processor.saturates()


def test_the_check_reads_on_where_calibration_stopped(shell: Shell, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words to read, and some more of them. " * 60)
    given = ("--scheme", "w8a8-static", "--calib-text", tmp_path / "text.txt", "--check-tokens", 64, *CALIBRATION)
    done = shell.ok("quantize", model, tmp_path / "q.onnx", "--json", *given).json
    assert done["check"]["text"] == f"{tmp_path / 'text.txt'}, parts that were not calibrated on"


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize(
    ("options", "slow"),
    [((), True), (("--w-bits", 8), False), (("--weight-type", "int8"), False), ((*FOUR, "--lm-head", "int8"), False)],
)
def test_who_is_better_served_by_seven_bits_is_told(
    options: tuple[object, ...],
    slow: bool,
    here: bool,
    shell: Shell,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """uint8 weights beside 8-bit activations, on a processor without VNNI, and nobody else."""
    monkeypatch.setattr(quantizing, "saturates", lambda: here)
    result = shell.ok("quantize", model, tmp_path / "q.onnx", "--no-check", *options)
    assert ("--w-bits 7" in result.err) == (slow and here)


def test_models_the_wrong_way_round(shell: Shell, model: Path, tmp_path: Path) -> None:
    """What was lost would be said of the original, and every limit be kept."""
    for format_ in ("qdq", "fake"):
        out = tmp_path / format_ / "q.onnx"
        shell.ok("quantize", model, out, "--config", quantizing_as(format_, tmp_path), "--no-check", "--no-verify")
        line = shell.fails("compare", out, model, "--max-ppl-ratio", 2)
        assert line.endswith("is quantized and QUANTIZED " + str(model) + " is not: name the float model first")
        both = shell.ok("compare", out, out, "--tokens", 64)
        assert f"note: {out} is quantized itself: the figures tell how far the two are apart" in both.err
        assert "quantized" not in shell.ok("compare", model, out, "--tokens", 64).err
        assert "one of the models is quantized, which changes what it computes" in shell("verify", model, out).err
        assert "quantized" not in shell.ok("verify", out, out).err


def quantizing_as(format_: str, folder: Path) -> Path:
    path = folder / f"{format_}.json"
    path.write_text(json.dumps({"global_config": {"weight": "UInt8"}, "output_format": format_}))
    return path


def test_a_rotation_of_an_earlier_run_is_said_to_be_one(shell: Shell, model: Path, tmp_path: Path) -> None:
    rotated, target = tmp_path / "r.onnx", tmp_path / "q.onnx"
    assert shell.ok("rotate", model, rotated, "--no-verify").out.startswith("rotated: R1 at 5")
    assert shell.ok("rotate", model, rotated, "--no-verify", "--prefix-ids", 1).out.startswith("rotated: R1 at 5")
    assert shell.ok("rotate", model, rotated).out.startswith("rotated: R1 at 5")
    assert "\nrotated before: R1 at 5" in "\n" + shell.ok("quantize", rotated, target).out
    assert "\nrotated: R1 at 5" in "\n" + shell.ok("quantize", model, target).out
    assert "\nrotated: R1 at 5" in "\n" + shell.ok("quantize", model, target, "--no-verify").out
