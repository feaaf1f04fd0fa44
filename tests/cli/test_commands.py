"""Every command does what it says, in text and as one JSON object."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import exports
import linear_graphs as graphs
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from command_line import Shell, files

from quarot_onnx.cli import console
from quarot_onnx.graph.linear import linears
from quarot_onnx.io import model_io

PERCENTILE = ("--calib-method", "percentile", "--percentile", 99.9)
CALIBRATION = ("--calib-samples", 2, "--calib-seq-len", 16)


def recipe(path: Path) -> dict:
    return json.loads(onnx.load(path, load_external_data=False).metadata_props[0].value)


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


def test_inspect(shell: Shell, model: Path) -> None:
    content = shell.ok("inspect", model, "--json").json
    expected = {
        "architecture": "llama", "layers": 2, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32,
        "num_heads": 4, "num_kv_heads": 2, "tied_embeddings": False, "sites": {"R1": 5, "R2": 2, "R3": 2, "R4": 2},
        "left_out": [],
    }  # fmt: skip
    assert {key: content[key] for key in expected} == expected
    text = shell.ok("inspect", model).out
    for word in (str(model), "as of llama, 2 layers", "4 heads, 2 KV heads of 32", "R4"):
        assert word in text
    by_folder = shell.ok("inspect", model.parent, "--json").json
    assert by_folder == content


@pytest.mark.parametrize("command", ["verify", "compare"])
def test_two_models_are_compared_with_a_bar_where_somebody_looks(
    command: str, shell: Shell, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True, raising=False)
    bar = {"verify": "comparing with the original", "compare": "checking the quantized model"}[command]
    options = ["--tokens", "16"]
    assert bar in shell.ok(command, model, model, *options).err
    assert bar not in shell.ok(command, model, model, *options, "--quiet").err
    assert bar not in shell.ok(command, model, model, *options, "--json").err


def test_inspect_tells_what_is_left_out_and_writes_a_config(shell: Shell, tmp_path: Path) -> None:
    source = exports.optimum_export("gpt_neox")
    left_out = shell.ok("inspect", source, "--json").json["left_out"]
    assert left_out
    assert all(entry["node"] and entry["reason"] for entry in left_out)
    config = tmp_path / "rotation_config.json"
    llama = exports.optimum_export("llama")
    written = shell.ok("inspect", llama, "--write-config", config, "--json").json
    assert written["written_config"] == str(config)
    again = shell.ok("inspect", llama, "--rotation-config", config, "--json").json
    assert again["sites"] == written["sites"]


def test_inspect_something_else(shell: Shell, tmp_path: Path) -> None:
    onnx.save(graphs.two_linears(), tmp_path / "m.onnx")
    content = shell.ok("inspect", tmp_path / "m.onnx", "--json").json
    assert (content["architecture"], content["layers"], content["linears"]) == ("not a decoder", 0, 2)
    assert "not a decoder" in shell.ok("inspect", tmp_path / "m.onnx").out


def test_rotate_and_verify(shell: Shell, model: Path, tmp_path: Path) -> None:
    before = files(model.parent)
    out = tmp_path / "out" / "rotated.onnx"
    done = shell.ok("rotate", model, out, "--random-had", "--seed", 7, "--json").json
    assert files(model.parent) == before
    assert done["model"] == str(out)
    assert done["equivalence"]["passed"]
    rotation = recipe(out)["rotation"]
    assert rotation["counts"] == {"R1": 5, "R2": 2, "R4": 2}
    assert rotation["rotations"]["R1"]["seed"] == 7
    report = json.loads((out.parent / "rotated.quarot.json").read_text())
    assert report["rotation"] == rotation
    assert report["equivalence"]["passed"]
    figures = shell.ok("verify", model, out, "--json").json
    assert figures["passed"]
    assert {"max_abs_logit_diff", "max_rel_logit_diff", "kl", "top1_agreement"} <= figures.keys()
    assert "the same" in shell.ok("verify", model, out).out
    for name in ("tokenizer.json", "config.json"):
        assert (out.parent / name).read_bytes() == (model.parent / name).read_bytes()
    assert "already rotated" in shell.fails("rotate", out, tmp_path / "twice.onnx")


@pytest.mark.parametrize(
    ("switches", "counts"),
    [
        (["--r1", "--no-r2", "--no-r4"], {"R1": 5}),
        (["--no-r4"], {"R1": 5, "R2": 2}),
        (["--r3"], {"R1": 5, "R2": 2, "R3": 2, "R4": 2}),
    ],
    ids=str,
)
def test_rotation_switches(shell: Shell, model: Path, tmp_path: Path, switches: list[str], counts: dict) -> None:
    shell.ok("rotate", model, tmp_path / "r.onnx", *switches, "--r-matrix-dim", 64, "--no-verify", "--quiet")
    assert recipe(tmp_path / "r.onnx")["rotation"]["counts"] == counts


def test_verify_finds_one_weight_that_is_one_percent_off(shell: Shell, model: Path, tmp_path: Path) -> None:
    damaged = model_io.load(model)
    weight = next(iter(linears(damaged.graph))).weight
    array = model_io.read_array(weight.tensor) * np.float32(1.01)
    weight.value.const_value = ir.Tensor(array, name=weight.value.name)
    model_io.save(damaged, tmp_path / "damaged.onnx")
    result = shell("verify", model, tmp_path / "damaged.onnx", "--json")
    assert result.status == 1
    assert result.json["passed"] is False
    assert result.err.startswith("error: the models differ")
    assert "DIFFERENT" in shell("verify", model, tmp_path / "damaged.onnx").out


def test_quantize_per_token_by_default(shell: Shell, model: Path, tmp_path: Path) -> None:
    before = files(model.parent)
    done = shell.ok("quantize", model, tmp_path / "q", "--json").json
    path = tmp_path / "q" / "model.onnx"
    assert done["model"] == str(path)
    assert done["recipe"]["quantization"]["linears"] == 15, "the head is int8"
    assert done["recipe"]["rotation"]["counts"] == {"R1": 5, "R2": 2, "R4": 2}
    assert not [note for note in done["notes"] if "int8" in note.replace("--lm-head int8", "").replace("uint8", "")]
    assert files(model.parent) == before
    assert sorted(name for name in files(tmp_path) if ".quarot" in name and not name.endswith(".quarot.json")) == []


@pytest.mark.parametrize(
    ("options", "linears_", "embeddings", "rotation", "activation"),
    [
        (["--scheme", "w8"], 14, 0, "R1 R2", None),
        (["--scheme", "w8", "--per-tensor", "--lm-head", "int8", "--no-rotate"], 15, 0, "", None),
        (["--scheme", "w8", "--embedding", "int8", "--w-asym"], 14, 1, "R1 R2", None),
        (["--scheme", "w8a8-static", *CALIBRATION], 14, 0, "R1 R2 R4", "Tensor"),
        (["--scheme", "w8a8-static", "--a-sym", "--no-r4", *CALIBRATION], 14, 0, "R1 R2", "Tensor"),
        (
            ["--scheme", "w8a8-static", *PERCENTILE, "--no-rotate", *CALIBRATION],
            14, 0, "", "Tensor",
        ),
        (["--scheme", "w8a8-dynamic", "--lm-head", "float", "--embedding", "int8"], 14, 1, "R1 R2 R4", "Token"),
    ],
    ids=str,
)  # fmt: skip
def test_quantize_schemes(
    shell: Shell, model: Path, text: Path, tmp_path: Path, options, linears_, embeddings, rotation, activation
) -> None:
    extra = ["--calib-text", text, "--tokenizer", model.parent] if "w8a8-static" in options else []
    done = shell.ok("quantize", model, tmp_path / "q.onnx", *options, *extra, "--json").json
    quantization = done["recipe"]["quantization"]
    assert (quantization["linears"], quantization["embeddings"]) == (linears_, embeddings)
    assert set(done["recipe"].get("rotation", {}).get("counts", {})) == set(rotation.split())
    spec = quantization["config"]["global_config"]["activation"]
    assert (spec and spec["quant_granularity"]) == activation
    ops = operators(tmp_path / "q.onnx")
    assert ("QuantizeLinear" in ops) == (activation is not None)
    assert "DequantizeLinear" in ops
    shell.ok("evaluate", tmp_path / "q.onnx", "--text", text, "--seq-len", 32, "--windows", 1, "--quiet")


def test_quantize_with_config_files(shell: Shell, model: Path, tmp_path: Path) -> None:
    places = tmp_path / "rotation_config.json"
    shell.ok("inspect", model, "--write-config", places)
    head = shell.ok("inspect", model, "--json").json["lm_head"][0]
    config = tmp_path / "config.yaml"
    config.write_text(
        "global_config: {weight: {data_type: Int8, quant_granularity: Channel}}\n"
        f"exclude: ['{head}']\n"
        "algo_config: [{name: quarot, r_config_path: rotation_config.json, r4: false, r3: false}]\n"
    )
    done = shell.ok("quantize", model, tmp_path / "q.onnx", "--config", config, "--json").json
    assert done["recipe"]["quantization"]["linears"] == 14
    assert set(done["recipe"]["rotation"]["counts"]) == {"R1", "R2"}


def test_jobs_change_no_byte(shell: Shell, model: Path, tmp_path: Path) -> None:
    for jobs in (1, 3):
        shell.ok("rotate", model, tmp_path / str(jobs) / "r.onnx", "--no-verify", "--jobs", jobs, "--quiet")
    first, second = (files(tmp_path / str(jobs)) for jobs in (1, 3))
    assert first == second
    assert "--jobs" in shell.fails("rotate", model, tmp_path / "0.onnx", "--jobs", 0)


def test_a_rotated_model_is_quantized_as_it_is(shell: Shell, model: Path, tmp_path: Path) -> None:
    shell.ok("rotate", model, tmp_path / "r.onnx", "--random-had", "--seed", 3)
    result = shell.ok("quantize", tmp_path / "r.onnx", tmp_path / "q.onnx", "--json")
    assert "already rotated (R1 at 5 places" in result.json["notes"][0]
    assert "already rotated" in result.err
    assert recipe(tmp_path / "q.onnx")["rotation"] == recipe(tmp_path / "r.onnx")["rotation"]
    assert result.json["recipe"]["quantization"]["linears"] == 15, "no Hadamard among them"
    for option in ("--r1", "--random-had"):
        assert "already rotated" in shell.fails("quantize", tmp_path / "r.onnx", tmp_path / "q2.onnx", option)


def test_evaluate(shell: Shell, model: Path, text: Path) -> None:
    content = shell.ok("evaluate", model, "--text", text, "--seq-len", 32, "--windows", 3, "--json").json
    assert content["windows"] == 3
    assert content["tokens"] == 3 * 31
    assert content["perplexity"] > 1
    whole = shell.ok("evaluate", model, "--text", text, "--seq-len", 32, "--windows", 0, "--json").json
    assert whole["windows"] == len(text.read_bytes()) // 31
    assert (
        f"{content['perplexity']:.4f}"
        in shell.ok("evaluate", model, "--text", text, "--seq-len", 32, "--windows", 3).out
    )


def test_notes_go_to_standard_error(shell: Shell, model: Path, text: Path, tmp_path: Path) -> None:
    result = shell.ok("quantize", model, tmp_path / "q.onnx", "--scheme", "w8", "--calib-text", text, "--json")
    kernels, unused = result.json["notes"]
    assert "accuracy level 4, which rounds activations" in kernels
    assert unused == "nothing is calibrated: --calib-text not used"
    assert result.err == f"note: {kernels}\nnote: {unused}\n"


def test_demo_passes_its_options_on(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quarot_onnx import demo  # noqa: PLC0415

    row = {"name": "W8A8 static, R1+R2+R4", "perplexity": 12.345, "ratio": 1.01, "size_mb": 99.9, "seconds": 3.21}
    seen: dict[str, object] = {}

    def fake(out: Path, *, windows: int, say: object) -> dict[str, object]:
        seen.update(out=out, windows=windows)
        return {"rows": [row | {"prefill_tokens_per_s": 1234.5}], "out": str(out), "processor": "a processor"}

    monkeypatch.setattr(demo, "run_demo", fake)
    printed = shell.ok("demo", "--out", tmp_path / "d", "--windows", 2).out
    assert seen == {"out": tmp_path / "d", "windows": 2}
    assert max(map(len, printed.splitlines()[1:-1])) <= 80
    for number in ("12.35", "1.010", "100", "3.2", "1234", "processor: a processor"):
        assert number in printed
    assert shell.ok("demo", "--out", tmp_path / "d", "--json").json["rows"] == [row | {"prefill_tokens_per_s": 1234.5}]


COMMANDS = ("export", "inspect", "rotate", "quantize", "verify", "compare", "evaluate", "generate", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(shell: Shell, command: str) -> None:
    printed = shell.ok(command, "--help").out
    assert f"quarot-onnx {command}" in printed.split("Example", 1)[1]


def test_version_and_no_arguments(shell: Shell) -> None:
    from importlib.metadata import version  # noqa: PLC0415

    assert shell.ok("--version").out.strip() == version("quarot-onnx")
    assert "quantize" in shell.ok().out


def test_non_finite_numbers_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": None}}


def test_tables_are_plain_and_uncut_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/a/very/long/path/" * 9 + "[model].onnx"
    console.table("[title]", ["", "value"], [["model", path], ["size", "12"]])
    title, _, first, second = capsys.readouterr().out.splitlines()
    assert title == "[title]"
    assert first.endswith(path)
    assert second.split() == ["size", "12"]


def test_as_a_program(model: Path, tmp_path: Path) -> None:
    """The installed script in a process of its own: standard output is JSON and nothing else."""
    script = shutil.which("quarot-onnx", path=str(Path(sys.executable).parent))
    assert script is not None
    done = subprocess.run(
        [script, "quantize", model, tmp_path / "q.onnx", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["recipe"]["quantization"]["linears"] == 15
    assert done.stderr.splitlines() == [f"note: {note}" for note in told["notes"]]
    for program in ([script], [sys.executable, "-m", "quarot_onnx"]):
        missing = subprocess.run(
            [*program, "inspect", tmp_path / "no.onnx"], capture_output=True, text=True, check=False
        )
        assert (missing.returncode, missing.stdout) == (2, "")
        assert missing.stderr.startswith("error: no model at")


def test_what_an_encoding_lacks_is_a_question_mark(model: Path, tmp_path: Path) -> None:
    """A file on Windows, or a pipe under an old locale, takes neither × nor Δ."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    commands = (
        ["inspect", model],
        ["quantize", model, tmp_path / "q.onnx"],
        ["generate", model, "--prompt", "na\u00efve", "--max-new-tokens", "12"],
    )
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "quarot_onnx", *map(str, command)], capture_output=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        assert b"?" in done.stdout
        done.stdout.decode("ascii")


def test_a_written_config_does_not_replace_the_models_own(shell: Shell, model: Path) -> None:
    config = model.with_name("config.json")
    before = config.read_bytes()
    assert "config.json" in shell.fails("inspect", model, "--write-config", config)
    assert config.read_bytes() == before
