"""Examples, benchmarks and the documents' code run as they are written, on a tiny export."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import Shell

from quarot_onnx.calibration.text import default_text
from quarot_onnx.cli import main
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.evaluation.equivalence import compare
from quarot_onnx.graph.linear import linears
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import rotate
from quarot_onnx.sites.detect import detect

ROOT = Path(__file__).resolve().parents[1]
# A tensor of normal values that spans 7 standard deviations has an 8-bit step of 7/255 of one, an error of
# 7 / 255 / sqrt(12) = 0.8 %. Weight and activation of 14 Linears add up to sqrt(28) * 0.8 % = 4 % in the logits; twice
# that passes. A model that computes something else is off by 140 %.
RTOL_INT8 = 0.08


def run(*command: object, folder: Path = ROOT) -> str:
    """What a command prints; it must succeed."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "WINDOWS": "2",
        "SEQ_LEN": "64",
    }
    done = subprocess.run(
        list(map(str, command)), check=False, env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def blocks(document: str, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.M | re.S)
    assert found, f"{document} has no {language} block"
    return found


def check_8_bits(source: Path, target: Path, *, rotated: set[str], integers: int = onnx.TensorProto.UINT8) -> None:
    recipe = json.loads(target.with_suffix(".quarot.json").read_text())
    assert set(recipe["rotation"]["counts"]) == rotated
    weights = [i.data_type for i in onnx.load(target, load_external_data=False).graph.initializer if len(i.dims) == 2]
    assert weights.count(integers) >= 14, "7 Linears in each of 2 layers"
    assert compare(source, target).rel_l2 < RTOL_INT8


def run_example(name: str, *arguments: Path | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has imported already what takes most of an example's time."""
    path = ROOT / "examples" / name
    monkeypatch.setattr(sys, "argv", list(map(str, [path, *arguments])))
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("name", ["custom_reader.py", "quark_style.py"])
def test_python_examples_quantize_a_model(
    name: str, llama_optimum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "model.onnx"
    run_example(name, llama_optimum, out, monkeypatch=monkeypatch)
    integers = onnx.TensorProto.INT8 if name == "quark_style.py" else onnx.TensorProto.UINT8
    check_8_bits(llama_optimum, out, rotated={"R1", "R2", "R4"}, integers=integers)


@pytest.mark.parametrize("name", ["custom_reader.py", "generate.py", "kv_cache.py", "low_bit.py", "quark_style.py"])
@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["a"], 2), (["--help"], 0), (["a", "b", "--help"], 0)])
def test_examples_say_how_they_are_used(
    name: str,
    arguments: list[str],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as done:
        run_example(name, *arguments, monkeypatch=monkeypatch)
    assert done.value.code == status
    assert f"    python examples/{name} " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["memory.py", "cloze_task.py", "load_time.py", "repetition.py"])
def test_benchmarks_name_a_file_that_is_not_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [tmp_path / "out"] if name == "cloze_task.py" else []
    monkeypatch.setattr(sys, "argv", [name, *map(str, [tmp_path / "gone", *out])])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")
    assert done.value.code == 2
    assert f"{name}: error: there is no file {tmp_path / 'gone'}\n" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_generate(llama_optimum: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_example("generate.py", "The quick", llama_optimum, llama_optimum, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "alike for 32 of 32 tokens" in printed
    assert printed.count("tokens/s") == 2


def test_kv_cache(
    llama_optimum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It holds as many bytes as `quantize` said."""
    shell = Shell(capfd)
    model = tmp_path / "kv8" / "model.onnx"
    command = ["quantize", llama_optimum, model, "--kv-bits", "8", "--no-check", "--no-verify"]
    assert shell.ok(*command).err.count("288 bytes a position") == 1
    run_example("kv_cache.py", model, "The quick", monkeypatch=monkeypatch)
    text, held = capfd.readouterr().out.rsplit("\n", 2)[:2]
    assert held.endswith("288 for each")
    assert text.startswith("The quick")


@pytest.mark.slow
def test_low_bit(
    llama_optimum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "model.onnx"
    run_example("low_bit.py", llama_optimum, out, monkeypatch=monkeypatch)
    printed = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed[:-1] == ["W4A4 rtn", "W4A4 gptq", "W4A4 gptaq", "W4A4 qronos", "float"]
    weights = [i.data_type for i in onnx.load(out, load_external_data=False).graph.initializer if len(i.dims) == 2]
    assert weights.count(onnx.TensorProto.INT4) == 14
    assert weights.count(onnx.TensorProto.UINT8) == 1, "the head"


def test_all_examples_are_tested() -> None:
    tested = {"custom_reader.py", "quark_style.py", "generate.py", "kv_cache.py", "low_bit.py", "cli_walk.sh"}
    assert {path.name for path in (ROOT / "examples").iterdir() if path.is_file()} == tested


def test_quark_style_takes_a_rotation_config(
    llama_optimum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = tmp_path / "rotation_config.json", tmp_path / "model.onnx"
    config.write_text(json.dumps({"format": "quarot_onnx/1", "R1": "detect"}))
    run_example("quark_style.py", llama_optimum, out, config, monkeypatch=monkeypatch)
    check_8_bits(llama_optimum, out, rotated={"R1"}, integers=onnx.TensorProto.INT8)


@pytest.mark.slow
def test_cli_walk(llama_optimum: Path, tmp_path: Path) -> None:
    printed = run("sh", ROOT / "examples" / "cli_walk.sh", llama_optimum, tmp_path / "walk")
    assert printed.count("perplexity ") == 3, "in two evaluations, and in the check"
    assert "the same" in printed
    check_8_bits(llama_optimum, tmp_path / "walk" / "int8" / "model.onnx", rotated={"R1", "R2", "R4"})


def test_examples_are_short() -> None:
    for path in (ROOT / "examples").iterdir():
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path.name


@pytest.mark.further
def test_speed_benchmark(llama_optimum: Path, llama_dynamo: Path) -> None:
    printed = run(
        sys.executable, ROOT / "benchmarks" / "speed.py", llama_optimum, llama_optimum, llama_dynamo, "--runs", 2
    )
    *_, reference, same, cacheless = printed.splitlines()
    assert reference.split()[1] == reference.split()[3] == "1.00"
    assert all(float(number) > 0 for number in same.split()[:4])
    assert cacheless.split()[2:4] == ["-", "-"]


@pytest.mark.further
def test_memory_benchmark(llama_optimum: Path) -> None:
    tasks = ["quantize", "quantize_static"]
    wanted = [word for task in tasks for word in ("--task", task)]
    script = ROOT / "benchmarks" / "memory.py"
    printed = run(sys.executable, script, llama_optimum, "--samples", 1, "--seq-len", 32, *wanted)
    lines = [line.split() for line in printed.splitlines()[2:]]
    assert [name for name, *_ in lines] == tasks
    assert all(float(peak) > 50 for _, peak, _ in lines), "a process with NumPy and onnx is larger than 50 MB"


SMALL = [
    "--vocab",
    "97",
    "--hidden",
    "64",
    "--intermediate",
    "96",
    "--layers",
    "2",
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--head-dim",
    "16",
]


@pytest.mark.parametrize("spelling", ["genai", "optimum"])
@pytest.mark.parametrize(("shape", "dtype"), [("llama-2-7b", "float32"), ("qwen2-7b", "float16")])
def test_synthetic_models_are_found_and_proved(spelling: str, shape: str, dtype: str, tmp_path: Path) -> None:
    model, again = tmp_path / "model.onnx", tmp_path / "again.onnx"
    script = ROOT / "benchmarks" / "synthetic_llama.py"
    for path in (model, again):
        run(sys.executable, script, path, "--shape", shape, "--dtype", dtype, "--spelling", spelling, *SMALL)
    assert model.read_bytes() == again.read_bytes()
    outcome = rotate(model, tmp_path / "rotated.onnx", QuarotConfig())
    assert outcome.equivalence is not None
    assert not outcome.notes  # nothing is left out
    assert detect(model_io.load(model)).layers == 2


@pytest.mark.further
def test_scale_benchmark(tmp_path: Path) -> None:
    model, tasks = tmp_path / "model.onnx", ["rotate", "w8"]
    run(sys.executable, ROOT / "benchmarks" / "synthetic_llama.py", model, "--dtype", "float32", *SMALL)
    wanted = [word for task in tasks for word in ("--task", task)]
    printed = run(sys.executable, ROOT / "benchmarks" / "scale.py", model, "--rounds", 1, "--jobs", 1, *wanted)
    copied, *others = [line.split() for line in printed.splitlines()[2:]]
    assert copied[0] == "cp"
    assert copied[2] == "1.00"
    assert len(others) == len(tasks)
    assert all(float(line[-3]) > 50 for line in others), "a process with NumPy and onnx is larger than 50 MB"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.further
def test_kernels_benchmark(llama_optimum: Path) -> None:
    printed = run(sys.executable, ROOT / "benchmarks" / "kernels.py", llama_optimum, "--rows", 1, 3, "--rounds", 1)
    rows = [line.split() for line in printed.splitlines()[3:]]
    sizes = {(linear.in_features, linear.out_features) for linear in linears(model_io.load(llama_optimum).graph)}
    assert {(int(k), int(n)) for k, n, *_ in rows} == sizes
    assert sum(int(often) for _, _, often, *_ in rows) == 2 * 15, "every Linear, for both numbers of rows"
    assert {m for _, _, _, m, *_ in rows} == {"1", "3"}
    assert all(len(row) == 10 and all(float(number) > 0 for number in row[4:]) for row in rows)


@pytest.mark.further
def test_cache_positions_benchmark(llama_optimum: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(default_text()[:20_000], encoding="utf-8")
    script = ROOT / "benchmarks" / "cache_positions.py"
    printed = run(
        sys.executable, script, llama_optimum, text, text, "--calibrated", 96, "--windows", 2, "--length", 2048
    )
    rows = [
        line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| K") or line[:3] == "| V"
    ]
    assert len(rows) == 16, "keys and values, four kinds of scales, with R3 and without"
    assert all(0 < float(cell) < 0.5 for row in rows for cell in row[2:6])


@pytest.mark.further
def test_repetition_benchmark(llama_optimum: Path, qwen2_optimum: Path, tmp_path: Path) -> None:
    script, prompts = ROOT / "benchmarks" / "repetition.py", tmp_path / "prompts.txt"
    prompts.write_text("The quick brown fox\n\nA lazy dog\n", encoding="utf-8")
    command = [
        sys.executable,
        script,
        llama_optimum,
        llama_optimum,
        qwen2_optimum,
        "--prompts",
        prompts,
        "--tokens",
        12,
    ]
    blocks = re.split(r"^/", run(*command, "--last", 6, "--period", 3), flags=re.M)[1:]
    assert [len(block.splitlines()) for block in blocks] == [3, 3, 3]
    assert all(re.search(r"model.onnx: [0-2] of 2 end in repetition$", block.splitlines()[0]) for block in blocks)
    assert blocks[1].count(" the same") == 2
    ahead = re.findall(r"parts at \d+: ([\d.]+) logits ahead, p ([\d.]+) and ([\d.]+)$", blocks[2], re.M)
    assert len(ahead) == 2, "another model says something else"
    assert all(float(first) >= float(second) for _, first, second in ahead)


def test_what_counts_as_repetition() -> None:
    found = runpy.run_path(str(ROOT / "benchmarks" / "repetition.py"))["period"]
    assert found([9, *[1, 2, 3] * 4], last=9, longest=8) == 3
    assert found([1, 2] * 3 + [1], last=6, longest=8) == 2
    assert found([1] * 9, last=6, longest=8) == 1
    assert found([1, 2, 3] * 4, last=9, longest=2) is None
    assert found([1, 2, 3] * 2, last=9, longest=8) is None
    assert found([*[1, 2, 3] * 4, 4], last=9, longest=8) is None


@pytest.mark.further
@pytest.mark.slow
def test_accuracy_benchmark(llama_optimum: Path, tmp_path: Path) -> None:
    text, results = tmp_path / "text.txt", tmp_path / "accuracy.json"
    text.write_text(default_text()[:60_000], encoding="utf-8")
    odd = tmp_path / "odd.txt"
    odd.write_text("aab" * 1000, encoding="utf-8")
    command = [sys.executable, ROOT / "benchmarks" / "accuracy.py", llama_optimum, "--calib", text]
    command += ["--text", text, odd, "--results", results, "--seeds", 1, "--samples", 1, "--windows", 1]
    options = ["--schemes", "w4a4", "--methods", "rtn", "gptq"]
    printed = run(*command, *options)
    assert "| scheme | rotation | method | seeds | text | range | odd | range | minutes |" in printed
    rows = [line.split(" | ")[1:4] for line in printed.splitlines() if line.startswith("| W4A4")]
    assert rows == [["none", "rtn", "1"], ["R1+R2+R4", "rtn", "1"], ["R1+R2+R4", "gptq", "1"]]
    known = json.loads(results.read_text())
    assert set(known) == {"float", "w4a4/rtn/none", "w4a4/rtn/1", "w4a4/gptq/1"}
    assert "w4a4/" not in run(*command, *options), "what is known is not run again"
    run(*command, "--schemes", "w4a4", "--methods", "gptq", "--set", "perc_damp=0.5")
    damped = json.loads(results.read_text())["w4a4/gptq perc_damp=0.5/1"]["perplexity"]
    assert damped["text"] != known["w4a4/gptq/1"]["perplexity"]["text"]
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "odd.txt", "accuracy.json"}


@pytest.mark.further
def test_same_outputs_benchmark(llama_optimum: Path, tmp_path: Path) -> None:
    script, before, after = ROOT / "benchmarks" / "same_outputs.py", tmp_path / "before.json", tmp_path / "after.json"
    command = [sys.executable, script, llama_optimum, "--only", "w8/", "--samples", 1, "--seq-len", 32]
    run(*command, before)
    assert "1 of 1 the same" in run(*command, after, "--before", before)
    before.write_text(before.read_text().replace("model.onnx", "other.onnx"))
    with pytest.raises(AssertionError, match=r"0 of 1 the same\s+w8/asym"):
        run(*command, after, "--before", before)


@pytest.mark.further
@pytest.mark.slow
def test_layer_errors_benchmark(llama_optimum: Path, tmp_path: Path) -> None:
    """On what it was fitted to, the paper's Qronos is ahead of all others, and rounding to nearest behind."""
    text = tmp_path / "text.txt"
    text.write_text(default_text()[:60_000], encoding="utf-8")
    command = [sys.executable, ROOT / "benchmarks" / "layer_errors.py", llama_optimum, "--calib", text, "--text", text]
    printed = run(*command, "--samples", 2, "--windows", 1, "--blocks", 1, "--act-bits", 4)
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert rows[0] == ["method", "text", "text"]
    errors = {name: float(calibrated) for name, calibrated, _ in rows[1:]}
    assert min(errors, key=errors.__getitem__) == "qronos, alpha 1, damping 0.01"
    assert max(errors, key=errors.__getitem__) == "rtn"


@pytest.fixture(scope="module")
def reader_folder(qwen2_optimum: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README's reader has it: an export in ``onnx``, texts, and the results of the commands.

    Of the tiny models Qwen2 has head_dim = hidden_size / heads, on which optimum's ORTModelForCausalLM relies.
    """
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(qwen2_optimum.parent, folder / "onnx")
    shutil.copytree(ROOT / "rotation_configs", folder / "rotation_configs")
    for name in ("train.txt", "test.txt", "wikitext.txt"):
        (folder / name).write_text(default_text()[:30_000], encoding="utf-8")
    run(sys.executable, "benchmarks/cloze_task.py", folder / "test.txt", folder / "tasks", "--items", 4)
    return folder


COMMANDS = [
    line
    for document in ("README.md", "docs/low_bit.md", "docs/recipes.md")
    for block in blocks(document, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(("quarot-onnx ", "python benchmarks/"))
    and not line.startswith("quarot-onnx export ")
    and "--recipe step_" not in line  # LLMC's own files, which the reader brings
]


@pytest.mark.slow
def test_readme_commands(
    reader_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(reader_folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", reader_folder / "cache")
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers here are pytest's
    (reader_folder / "model.onnx").write_bytes((reader_folder / "onnx" / "model.onnx").read_bytes())
    commands = [shlex.split(line) for line in COMMANDS]
    assert {command[1] for command in commands if command[0] == "quarot-onnx"} == {
        "inspect", "rotate", "verify", "quantize", "compare", "evaluate", "generate", "optimize",
    }  # fmt: skip
    for command in commands:
        if command[0] == "python":
            assert (ROOT / command[1]).is_file()
            continue
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as done:
            main()
        assert not done.value.code, f"{shlex.join(command)}: {capsys.readouterr().err}"


@pytest.mark.slow
def test_readme_python(reader_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reader_folder)
    for number, block in enumerate(blocks("README.md", "python")):
        if "transformers" in block:  # warns about its own internals
            run(sys.executable, "-c", block, folder=reader_folder)
        else:
            exec(compile(block, f"README.md, block {number}", "exec"), {})


@pytest.mark.parametrize("document", ["docs/maths.md", "docs/adding_an_exporter.md", "docs/low_bit.md"])
def test_documents_python(document: str, reader_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a document share their names, top to bottom."""
    monkeypatch.chdir(reader_folder)
    names: dict[str, object] = {"np": np}
    for number, block in enumerate(blocks(document, "python")):
        exec(compile(block, f"{document}, block {number}", "exec"), names)


LINKS = [
    (path.relative_to(ROOT), link)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("document", "link"), LINKS, ids=str)
def test_links_lead_somewhere(document: Path, link: str) -> None:
    target, _, anchor = link.partition("#")
    path = (ROOT / document).parent / target if target else ROOT / document
    assert path.exists()
    if anchor:
        titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
        assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
