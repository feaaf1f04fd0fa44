"""What an error advises is there for whoever reads it, and leads on."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import odd_decoders as odd
import onnx
import pytest
import tiny_decoders as tiny
from command_line import Shell
from onnx import numpy_helper
from passed import Asks

GPTQ = "--weights gptq"


@pytest.fixture
def calibrated(text: Path) -> tuple[object, ...]:
    return "--calib-text", text, "--calib-samples", 2, "--calib-seq-len", 16


@pytest.mark.parametrize(
    ("typed", "way", "followed"),
    [
        ("--scheme w8 --percdamp 0.1", "give --w-bits 8 in place of --scheme w8, or leave it out", "--w-bits 8"),
        ("--recipe w8 --percdamp 0.1", "give --w-bits 8 in place of --recipe w8, or leave it out", "--w-bits 8"),
        (
            "--scheme w8a8-dynamic --percdamp 0.1",
            "give --w-bits 8 --a-bits 8 in place of --scheme w8a8-dynamic, or leave it out",
            "--w-bits 8 --a-bits 8",
        ),
        ("--scheme w8a8-static --percdamp 0.1", "bits: add --weights, or leave it out", "--scheme w8a8-static"),
        ("--scheme w8a16-static --percdamp 0.1", "bits: add --weights, or leave it out", "--scheme w8a16-static"),
        ("--percdamp 0.1", "add --w-bits or --weights, or leave it out", "--w-bits 8"),
        ("--percdamp 0.1", "add --w-bits or --weights, or leave it out", ""),
    ],
)
def test_from_a_scheme_to_numbers_of_bits(
    typed: str, way: str, followed: str, refused_early: Callable[..., str], asks: Asks, calibrated: tuple[object, ...]
) -> None:
    assert way in refused_early(*typed.split())
    rounding = asks(*followed.split(), *GPTQ.split(), "--percdamp", 0.1, *calibrated).config.rounding
    assert rounding is not None
    assert rounding.perc_damp == 0.1


@pytest.mark.parametrize(
    ("typed", "way", "followed"),
    [
        ("--scheme w4a8", "--scheme w4a16", "--scheme w4a16"),
        ("--w-bits 4 --a-bits 8", "--a-bits 16", "--w-bits 4 --a-bits 16"),
        ("--scheme w8a8-static --weights rtn", "--scheme w4a16", "--scheme w4a16 --weights rtn"),
        ("--w-bits 4 --format fake", "--format nbits", "--w-bits 4 --format nbits"),
    ],
)
def test_an_accuracy_level_goes_with_float_activations(
    typed: str, way: str, followed: str, refused_early: Callable[..., str], asks: Asks, calibrated: tuple[object, ...]
) -> None:
    level = ("--accuracy-level", 4)
    assert f"; use {way}, or leave it out" in refused_early(*typed.split(), *level)
    assert asks(*followed.split(), *level, *calibrated).config.accuracy_level == 4


def test_inspect_takes_what_its_errors_advise(shell: Shell, model: Path, tmp_path: Path) -> None:
    short, lines = tmp_path / "short.txt", tmp_path / "short.jsonl"
    short.write_text("one two three")
    lines.write_text('{"txt": "one"}')
    sinks = ("inspect", model, "--sinks", "--text")
    assert "there are 13: give more text (--text)" in shell.fails(*sinks, short)
    assert "name the text's with --text-key" in shell.fails(*sinks, lines)
    assert "there are 3: give more text (--text)" in shell.fails(*sinks, lines, "--text-key", "txt")
    assert "need 1984 tokens of text" in shell.fails(*sinks, short, "--no-bos")
    assert "token id 999 is outside" in shell.fails("inspect", model, "--sinks", "--bos-id", 999)
    for option in ("--text", "--tokenizer", "--text-key", "--bos-id"):
        assert f"{option} is read for --sinks alone" in shell.fails("inspect", model, option, 1)
    for option in ("--bos", "--no-bos"):
        assert f"{option} is read for --sinks alone" in shell.fails("inspect", model, option)


def test_a_folder_in_place_of_a_file(shell: Shell, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "out.onnx.data").mkdir(parents=True)
    line = shell.fails("inspect", model, "--write-config", folder)
    assert line.endswith(f"is a folder; name a file in it, such as {folder / 'rotation_config.json'}")
    line = shell.fails("rotate", model, folder / "out.onnx")
    assert line.endswith("out.onnx.data is a folder; move it, or write elsewhere")


def test_a_text_that_is_too_short_to_compare_on(shell: Shell, model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("one two three")
    line = shell.fails("compare", model, model, "--text", tmp_path / "short.txt")
    assert line.endswith("compare on fewer tokens, or give more text")
    (tmp_path / "short.txt").write_text("o")
    line = shell.fails("evaluate", model, "--text", tmp_path / "short.txt")
    assert line.endswith("there are 1: give more text")
    (tmp_path / "short.txt").write_text("one two three " * 8)
    shell.ok("compare", model, model, "--text", tmp_path / "short.txt", "--tokens", 64)


def test_models_with_different_vocabularies(shell: Shell, model: Path, tmp_path: Path) -> None:
    other = odd.write(tmp_path / "other", odd.Spec())
    tiny.tokenizer(odd.VOCAB).save(str(other.with_name("tokenizer.json")))
    for command in ("compare", "verify"):
        for first, second, sizes in ((model, other, (264, odd.VOCAB)), (other, model, (odd.VOCAB, 264))):
            line = shell.fails(command, first, second)
            assert f"{first} has a vocabulary of {sizes[0]} and {second} one of {sizes[1]}: these are differ" in line


def test_a_model_without_the_logits_of_all_positions_goes_without_the_check(
    shell: Shell, model: Path, text: Path, tmp_path: Path
) -> None:
    proto = onnx.load(model)
    graph = proto.graph
    head = next(node for node in graph.node if node.output[0] == "logits")
    for name, number in (("last", -1), ("end", 2**62), ("axis", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array([number]), name))
    place = list(graph.node).index(head)
    graph.node.insert(place, onnx.helper.make_node("Slice", [head.input[0], "last", "end", "axis"], ["kept"]))
    head.input[0] = "kept"
    next(value for value in graph.output if value.name == "logits").type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(proto, model)
    why = r"model.onnx gives no logits for each of \d+ tokens, .*: export the model without pruning its logits"
    way = r"; or leave out what demands the check \(--check-text, --max-kl, --max-ppl-ratio; text=, limits= of Check"
    for options in (("--check-text", text), ("--max-kl", 1)):
        assert re.search(why + way, shell.fails("quantize", model, tmp_path / "q.onnx", "--scheme", "w8", *options))
    done = shell.ok("quantize", model, tmp_path / "q.onnx", "--scheme", "w8", "--json").json
    assert any(re.search(f"was not checked: .*{why}$", note) for note in done["notes"])
    assert re.search(f"{why}$", shell.fails("compare", model, tmp_path / "q.onnx"))
