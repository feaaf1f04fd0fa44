"""Bad input: exit status 2, one line that names the value and the way out, nothing written, the input untouched."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import exports
import linear_graphs as graphs
import numpy as np
import onnx
import pytest
from command_line import Shell, files
from onnx import numpy_helper

from quarot_onnx.errors import VerificationError

STATIC = ("--scheme", "w8a8-static", "--calib-samples", 2, "--calib-seq-len", 16)


@pytest.fixture
def refused(shell: Shell, tmp_path: Path) -> Callable[..., str]:
    """Run what must fail; nothing under the test's folder may change."""

    def check(*arguments: object, status: int = 2) -> str:
        before = files(tmp_path)
        line = shell.fails(*arguments, status=status)
        assert files(tmp_path) == before
        return line

    return check


@pytest.mark.parametrize("command", ["inspect", "rotate", "quantize", "evaluate", "verify"])
def test_models_that_cannot_be_read(command: str, refused, model: Path, text: Path, tmp_path: Path) -> None:
    truncated = model.with_name("truncated.onnx")
    truncated.write_bytes(model.read_bytes()[:5000])
    more = {"evaluate": ["--text", text], "verify": [model], "inspect": []}.get(command, [tmp_path / "out.onnx"])
    assert "truncated" in refused(command, truncated, *more)
    assert re.search(
        r"no model at .*modell\.onnx.*did you mean", refused(command, model.with_name("modell.onnx"), *more)
    )


@pytest.mark.parametrize("command", ["inspect", "rotate", "quantize"])
def test_missing_external_data(command: str, refused, tmp_path: Path) -> None:
    source = exports.genai_like()
    shutil.copy(source, tmp_path / "m.onnx")
    line = refused(command, tmp_path / "m.onnx", *([] if command == "inspect" else [tmp_path / "out.onnx"]))
    assert f"{source.name}.data" in line


@pytest.mark.parametrize("command", ["rotate", "quantize"])
def test_no_decoder_and_no_pairs(command: str, refused, tmp_path: Path) -> None:
    onnx.save(graphs.two_linears(), tmp_path / "m.onnx")
    line = refused(command, tmp_path / "m.onnx", tmp_path / "out.onnx")
    assert "not a decoder" in line
    assert "online_pairs" in line


@pytest.mark.parametrize("command", ["rotate", "quantize"])
def test_a_wrong_size_names_both_numbers(command: str, refused, model: Path, tmp_path: Path) -> None:
    line = refused(command, model, tmp_path / "out.onnx", "--r-matrix-dim", 4096)
    assert "4096" in line
    assert "64" in line.replace("4096", "")


def test_unknown_keys_and_nodes_in_files(refused, model: Path, tmp_path: Path) -> None:
    config, places = tmp_path / "config.json", tmp_path / "places.json"
    config.write_text('{"global_config": {"weight": "Int8"}, "exclud": []}')
    line = refused("quantize", model, tmp_path / "out.onnx", "--config", config)
    assert "config.json" in line
    assert "'exclud'" in line
    assert "'exclude'" in line
    config.write_text('{"global_config": {"weight": "Int8"}, "exclude": ["/lm_head/MatMull"]}')
    assert "'/lm_head/MatMul'" in refused("quantize", model, tmp_path / "out.onnx", "--config", config)
    config.write_text("{")
    assert "line 1" in refused("quantize", model, tmp_path / "out.onnx", "--config", config)
    places.write_text('{"R1_pairs": [{"prev_node": [], "next_nodes": []}]}')
    for command in ("rotate", "quantize"):
        line = refused(command, model, tmp_path / "out.onnx", "--rotation-config", places)
        assert "prev_nodes" in line
    places.write_text(
        '{"R1_pairs": [{"prev_nodes": ["/model/embed_tokens/Gathr"], '
        '"next_nodes": ["/model/layers.0/self_attn/q_proj/MatMul"]}]}'
    )
    line = refused("rotate", model, tmp_path / "out.onnx", "--rotation-config", places)
    assert "'/model/embed_tokens/Gathr'" in line
    assert "/model/embed_tokens/Gather" in line


def test_blocks_that_a_file_states_otherwise(refused, shell: Shell, model: Path, tmp_path: Path) -> None:
    config = tmp_path / "rotations.json"
    config.write_text('{"format": "quarot_onnx/1", "R1": {"block_size": 16}, "R2": "detect"}')
    line = refused("rotate", model, tmp_path / "out.onnx", "--rotation-config", config, "--block-size", 32)
    assert f"block_size (--block-size) 32 contradicts {config}, which states blocks of 16 for R1" in line
    shell.ok("rotate", model, tmp_path / "same.onnx", "--rotation-config", config, "--block-size", 16, "--no-verify")


def test_misspelt_nodes_and_options(refused, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert "did you mean" in refused("quantize", model, out, "--exclude", "/lm_head/MatMull")
    assert "--scheme" in refused("quantize", model, out, "--shceme", "w8")
    assert "'w8a9'" in refused("quantize", model, out, "--scheme", "w8a9")
    assert "quantise" in refused("quantise", model, out)
    assert "MODEL" in refused("quantize")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--a-asym"], "--a-asym"),
        (["--scheme", "w8", "--a-sym"], "--a-sym"),
        (["--calib-method", "percentile"], "--calib-method"),
        (["--scheme", "w8a8-static", "--percentile", "99"], "--percentile"),
        (["--scheme", "w8a8-static", "--calib-method", "percentile", "--percentile", "200"], "200"),
        (["--no-rotate", "--r1"], "--r1"),
        (["--no-rotate", "--random-had"], "--random-had"),
        (["--config", "config.json", "--scheme", "w8"], "--scheme"),
        (["--seed", "-1"], "-1"),
        (["--calib-samples", "-1"], "-1"),
        (["--calib-samples", "0"], "0"),
        (["--calib-seq-len", "-5"], "-5"),
        (["--scheme", "w8a8-static", "--calib-seq-len", f"{10**30}"], f"windows of {10**30} need"),
        (["--fix-shape", f"batch_size={10**30}"], "fits into 31 bits"),
        (["--r-matrix-dim", "0"], "0"),
        (["--block-size", "-2"], "-2"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(refused, model: Path, tmp_path: Path, options: list[str], named: str) -> None:
    assert named in refused("quantize", model, tmp_path / "out.onnx", *options)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("evaluate", ["--windows", "-1"]),
        ("evaluate", ["--seq-len", "1"]),
        ("verify", ["--tokens", "0"]),
        ("verify", ["--tokens", f"{10**30}"]),
        ("compare", ["--tokens", f"{10**30}"]),
        ("verify", ["--seed", "-3"]),
        ("verify", ["--seed", "three"]),
    ],
)
def test_numbers_out_of_range(refused, model: Path, text: Path, command: str, options: list[str]) -> None:
    more = ["--text", text] if command == "evaluate" else [model]
    assert options[1] in refused(command, model, *more, *options)


@pytest.mark.parametrize("command", ["rotate", "quantize"])
def test_the_output_must_not_be_the_input(command: str, refused, model: Path, tmp_path: Path) -> None:
    symlink, hard = tmp_path / "link.onnx", tmp_path / "hard.onnx"
    symlink.symlink_to(model)
    os.link(model, hard)
    for out in (model, symlink, hard, model.parent):
        line = refused(command, model, out)
        assert "overwrite the input" in line
        assert "another output" in line


@pytest.mark.parametrize("command", ["rotate", "quantize"])
def test_outputs_that_cannot_be_written(command: str, refused, model: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(command, model, tmp_path / "file" / "out.onnx")
    # Root may write everywhere: what the system says is imitated.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert "no permission" in refused(command, model, tmp_path / "out.onnx")


@pytest.mark.parametrize("name", ["x.gguf", "x.bin", "x.PT", "x.safetensors", "x.ort", "x.txt", "e/x.json"])
@pytest.mark.parametrize("command", ["rotate", "quantize"])
def test_outputs_named_like_other_files(command: str, name: str, refused, model: Path, tmp_path: Path) -> None:
    line = refused(command, model, tmp_path / name)
    assert f"{tmp_path / name} is named like a {Path(name).suffix} file" in line
    assert "name an .onnx file, or a folder" in line


@pytest.mark.parametrize("name", ["SmolLM2-1.7B", "out.v2", "x.json"])
def test_folders_with_points_in_their_names(name: str, shell: Shell, model: Path, tmp_path: Path) -> None:
    if name == "x.json":
        (tmp_path / name).mkdir()
    shell.ok("quantize", model, tmp_path / name, "--scheme", "w8", "--no-rotate")
    assert (tmp_path / name / "model.onnx").is_file()


@pytest.mark.parametrize("command", ["rotate", "quantize"])
def test_a_full_disk(command: str, refused, model: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "new" / "out.onnx"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    line = refused(command, model, out)
    assert "1,000 free" in line
    assert ".quarot" not in line
    monkeypatch.undo()
    write = Path.open

    def full(self: Path, mode: str = "r", *args: object, **kwargs: object):
        if "w" in mode and self.suffix in {".onnx", ".data"}:
            raise OSError(28, "No space left on device", str(self))
        return write(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    assert "No space left on device" in refused(command, model, out)


def test_calibration_data_are_checked_before_any_long_work(
    refused, model: Path, text: Path, tmp_path: Path, monkeypatch
) -> None:
    from quarot_onnx.run import turning  # noqa: PLC0415

    monkeypatch.setattr(turning, "apply_plan", lambda *_: pytest.fail("rotated before the data were checked"))
    command = ("quantize", model, tmp_path / "out.onnx", *STATIC)
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text(" \n")
    short.write_text("Too short for 2 windows.")
    assert "empty: name a file with text in it" in refused(*command, "--calib-text", empty)
    assert "30 tokens" in refused(*command, "--calib-text", short)
    assert "ask for shorter windows, or give more text" in refused(*command[:-1], 512, "--calib-text", short)
    assert "nowhere.txt" in refused(*command, "--calib-text", tmp_path / "nowhere.txt")
    assert "nowhere" in refused(*command, "--calib-text", text, "--tokenizer", tmp_path / "nowhere")
    (model.parent / "tokenizer.json").unlink()
    assert "--tokenizer" in refused(*command, "--calib-text", text)
    assert "--tokenizer" in refused("evaluate", model, "--text", text)


def test_a_tokenizer_that_is_not_there(refused, model: Path, tmp_path: Path) -> None:
    assert "no tokenizer at" in refused("quantize", model, tmp_path / "q.onnx", "--tokenizer", tmp_path / "nowhere")


def test_a_tokenizer_of_another_model(refused, model: Path, text: Path, tmp_path: Path) -> None:
    content = (model.parent / "tokenizer.json").read_text()
    other = tmp_path / "tokenizer.json"
    other.write_text(re.sub(r'("T": ?)\d+', r"\g<1>9999", content))
    quantize = ("quantize", model, tmp_path / "out.onnx", *STATIC, "--calib-text")
    evaluate = ("evaluate", model, "--windows", 2, "--seq-len", 32, "--text")
    for command in (quantize, evaluate):
        line = refused(*command, text, "--tokenizer", other)
        assert "9999" in line
        assert "264" in line, "the model's vocabulary"


@pytest.mark.parametrize("command", ["rotate", "quantize"])
def test_a_failed_proof_leaves_nothing(command: str, refused, model: Path, tmp_path: Path, monkeypatch) -> None:
    from quarot_onnx.run import turning  # noqa: PLC0415

    def differ(_: object) -> None:
        raise VerificationError("the models differ")

    monkeypatch.setattr(turning, "require", differ)
    assert "the models differ" in refused(command, model, tmp_path / "new" / "out.onnx", status=1)


def test_write_config_spares_the_model(refused, model: Path, tmp_path: Path) -> None:
    assert "overwrite the input" in refused("inspect", model, "--write-config", model)
    assert "folder" in refused("inspect", model, "--write-config", tmp_path)


def test_a_quantized_model_is_not_quantized_again(shell: Shell, refused, model: Path, tmp_path: Path) -> None:
    shell.ok("quantize", model, tmp_path / "q.onnx", "--scheme", "w8", "--no-rotate")
    for options in ([], ["--no-rotate"], ["--scheme", "w8"]):
        assert "already quantized" in refused("quantize", tmp_path / "q.onnx", tmp_path / "qq.onnx", *options)
    assert "already quantized" in refused("rotate", tmp_path / "q.onnx", tmp_path / "qq.onnx")


def test_errors_keep_standard_output_empty_with_json(refused, model: Path, tmp_path: Path) -> None:
    assert "4096" in refused("rotate", model, tmp_path / "out.onnx", "--r-matrix-dim", 4096, "--json")


def test_windows_longer_than_the_rotary_tables(refused, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("word " * 1500)
    assert "use 128 or fewer (--seq-len" in refused(
        "evaluate", exports.genai_like(), "--text", text, "--seq-len", 5000, "--windows", 1
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_damaged(value: float, refused, model: Path, tmp_path: Path) -> None:
    proto = onnx.load(model)
    name = next(node.input[1] for node in proto.graph.node if node.name.endswith("up_proj/MatMul"))
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    array = numpy_helper.to_array(weight).copy()
    array[3, 4] = value
    weight.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(proto, model)
    found = rf"the weight '{name}' of '\S*up_proj/MatMul' holds (NaN or infinity|some), and nothing can be made of it, "
    for words in ("rotate", "rotate --no-verify", "quantize", "quantize --no-verify --no-check"):
        command, *options = words.split()
        assert re.search(found, refused(command, model, tmp_path / "out.onnx", *options))
    assert re.search(f"on its own: {found}", refused("verify", model, model))


def test_a_damaged_gamma_is_named(refused, model: Path, tmp_path: Path) -> None:
    proto = onnx.load(model)
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name.endswith("input_layernorm.weight"))
    array = numpy_helper.to_array(weight).copy()
    array[3] = np.nan
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(proto, model)
    for words in ("rotate --no-verify", "quantize --no-verify --no-check"):
        command, *options = words.split()
        said = refused(command, model, tmp_path / "out.onnx", *options)
        assert f"the weight '{weight.name}' of a norm holds NaN or infinity" in said
