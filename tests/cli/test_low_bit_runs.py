"""Low bits through the whole pipeline, as typed: in one step, in two, and where the two disagree."""

import json
from pathlib import Path

import onnx
import pytest
from command_line import Shell

SHIPPED = Path(__file__).resolve().parents[2] / "rotation_configs" / "recipes"


@pytest.fixture(params=["w8a8", "w4a4"])
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A shipped recipe, with less to calibrate on."""
    content = (SHIPPED / f"{request.param}.yaml").read_text()
    path = tmp_path / f"{request.param}.yaml"
    path.write_text(content.replace("samples: 16", "samples: 2").replace("seq_len: 512", "seq_len: 64"))
    assert path.read_text() != content
    return path


def weights(path: Path) -> dict[str, bytes]:
    """Quantized weights; their names end in what they are."""
    model = onnx.load(path)
    found = {item.name: item for item in model.graph.initializer if item.name.endswith(("_rounded", "_int8", "_uint8"))}
    return {name: item.SerializeToString() for name, item in found.items()}


def test_one_step_and_two_give_the_same(shell: Shell, recipe: Path, model: Path, text: Path, tmp_path: Path) -> None:
    one, rotated, two = (tmp_path / name / "model.onnx" for name in ("one", "rotated", "two"))
    options = ("--recipe", recipe, "--calib-text", text, "--json")
    done = shell.ok("quantize", model, one, *options).json
    shell.ok("rotate", model, rotated, "--recipe", recipe)
    again = shell.ok("quantize", rotated, two, *options).json
    for outcome in (done, again):
        assert outcome["recipe"]["rotation"]["counts"] == {"R1": 5, "R2": 2, "R4": 2}
        bits = {"w8a8": "UInt8", "w4a4": "Int4"}[recipe.stem]
        assert outcome["recipe"]["quantization"]["config"]["global_config"]["weight"]["data_type"] == bits
    assert done["recipe"]["quantization"]["linears"] == {"w8a8": 15, "w4a4": 14}[recipe.stem]
    assert len(weights(one)) >= 14
    assert weights(one) == weights(two)
    figures = shell.ok("evaluate", two, "--text", text, "--seq-len", 32, "--windows", 2, "--json").json
    # About 260 of the 264 ids are as good as equally likely to a random model.
    assert 1 < figures["perplexity"] < 500


def test_steps_that_disagree_about_r4(shell: Shell, recipe: Path, model: Path, tmp_path: Path) -> None:
    rotated = tmp_path / "rotated" / "model.onnx"
    shell.ok("rotate", model, rotated, "--no-r4", "--no-verify")
    line = shell.fails("quantize", rotated, tmp_path / "out.onnx", "--recipe", recipe)
    assert "without R4" in line
    assert "r4=True" in line
    assert "online_rotate" in line
    assert not (tmp_path / "out.onnx").exists()


def test_typed_bits(shell: Shell, model: Path, text: Path, tmp_path: Path) -> None:
    options = ("--w-bits", 4, "--a-bits", 8, "--lm-head", "int8", "--nsamples", 2, "--calib-seq-len", 64)
    out = tmp_path / "out.onnx"
    printed = shell.ok("quantize", model, out, *options, "--calib-text", text)
    assert "R4 at 2 places" in printed.out
    assert printed.err.splitlines() == [
        f"note: calibrated on 2 windows of {text} and 2 that the model wrote (--calib-own 0 leaves them out)"
    ]
    record = json.loads(out.with_suffix(".quarot.json").read_text())
    assert record["calibration"] == {"text": str(text), "windows": 2, "spread": True, "more": 2, "seq_len": 64}
    config = record["quantization"]["config"]
    assert [item["name"] for item in config["algo_config"]] == ["quarot", "qronos"]
    kinds = [item.data_type for item in onnx.load(out, load_external_data=False).graph.initializer]
    assert kinds.count(onnx.TensorProto.INT4) == 14


def test_activations_alone(shell: Shell, model: Path, text: Path, tmp_path: Path) -> None:
    """Every weight of the rotated model is in the output as it was."""
    rotated, out = tmp_path / "rotated" / "model.onnx", tmp_path / "out" / "model.onnx"
    shell.ok("rotate", model, rotated, "--r4")
    done = shell.ok("quantize", model, out, "--w-bits", 16, "--a-bits", 4, "--a-asym", "--json").json
    assert done["recipe"]["rotation"]["counts"] == {"R1": 5, "R2": 2, "R4": 2}
    assert done["recipe"]["quantization"]["linears"] == 14
    assert done["recipe"]["quantization"]["config"]["global_config"]["weight"] is None
    before, after = (
        {item.name: item.SerializeToString() for item in onnx.load(path).graph.initializer} for path in (rotated, out)
    )
    assert before.items() <= after.items()
    figures = shell.ok("evaluate", out, "--text", text, "--seq-len", 32, "--windows", 2, "--json").json
    # About 260 of the 264 ids are as good as equally likely to a random model.
    assert 1 < figures["perplexity"] < 500
