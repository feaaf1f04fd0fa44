"""Models that allow no rotation are quantized without, where none was named; and what is said of rotated ones."""

from pathlib import Path

import exports
import pytest
from command_line import Shell

from quarot_onnx import ModelQuantizer, QConfig, QLayerConfig, QuarotConfig
from quarot_onnx.config import Int8Spec
from quarot_onnx.errors import ConfigError
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import RECIPE_KEY

W8 = QLayerConfig(weight=Int8Spec())
NONE_LEFT = "not rotated, as no place of the graph allows it"


@pytest.mark.parametrize("bits", [("--scheme", "w8"), ("--weights", "rtn", "--w-bits", 4)])
def test_weights_of_a_layernorm_model_are_quantized_with_a_note(
    bits: tuple[object, ...], tmp_path: Path, shell: Shell
) -> None:
    source = exports.optimum_export("gpt_neox")
    said = shell.ok("quantize", source, tmp_path / "by default" / "m.onnx", *bits).err
    assert NONE_LEFT in said
    assert "R1 left out: 5 places" in said
    assert "R2 left out" in said
    shell.ok("quantize", source, tmp_path / "without" / "m.onnx", *bits, "--no-rotate")
    first, second = (model_io.load(tmp_path / name / "m.onnx") for name in ("by default", "without"))
    assert '"rotation"' not in first.metadata_props[RECIPE_KEY]
    assert len(first.graph) == len(second.graph)


def test_a_rotation_that_is_named_has_to_be_possible(tmp_path: Path, shell: Shell) -> None:
    source, target = exports.optimum_export("gpt_neox"), tmp_path / "m.onnx"
    with pytest.raises(ConfigError, match="R1 is impossible"):
        ModelQuantizer(QConfig(W8, algo_config=[QuarotConfig(r1=True)])).quantize_model(source, target)
    none = shell.fails("quantize", source, target, "--scheme", "w8", "--no-r1")
    assert "no rotation is left to do: R2 left out" in none
    assert none.count("R2 left out") == 1
    assert "quantize its weights without rotation (--no-rotate" in none
    off = shell.fails("quantize", exports.optimum_export("llama"), target, "--scheme", "w8", "--no-r1", "--no-r2")
    assert "switch on at least one of R1 to R4, or quantize its weights without rotation (--no-rotate" in off
    rotated = shell.fails("rotate", source, target, "--no-r4")
    assert "no rotation is left to do: R1 left out: 5 places" in rotated
    assert "--no-rotate" not in rotated
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prefix", [(), ("--prefix-ids", "256,84")], ids=["", "prefix"])
def test_what_is_missing_or_needless_is_told_behind_a_prefix_too(
    prefix: tuple[object, ...], tmp_path: Path, shell: Shell, text: Path
) -> None:
    source, rotated = exports.optimum_export("llama"), tmp_path / "r" / "m.onnx"
    small = ("--no-check", "--overwrite", "--calib-samples", 2, "--calib-seq-len", 32, "--calib-text", text)
    shell.ok("rotate", source, rotated, *prefix)
    keys = shell.ok("quantize", rotated, tmp_path / "q" / "m.onnx", *small, "--kv-bits", 8).err
    assert "rotated without R3, which quantized keys gain from" in keys
    low = shell.ok("quantize", rotated, tmp_path / "q" / "m.onnx", *small, "--w-bits", 4, "--calib-own", 0).err
    assert "rotated with R4, which costs time at every step and gains little for weights alone" in low


def test_keys_that_are_balanced_need_no_other_rotation(tmp_path: Path, shell: Shell, text: Path) -> None:
    source, rotated = exports.optimum_export("llama"), tmp_path / "r" / "m.onnx"
    small = ("--no-check", "--calib-samples", 2, "--calib-seq-len", 32, "--calib-text", text)
    shell.ok("rotate", source, rotated)
    said = shell.ok("quantize", rotated, tmp_path / "q" / "m.onnx", *small, "--kv-bits", 4, "--k-balance").err
    assert "rotated without R3" not in said
