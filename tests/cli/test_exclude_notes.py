"""What is excluded and named for other bits at once: it stays in float, and a note says so."""

from pathlib import Path

import exports
import onnx
import pytest
from command_line import Shell

LOW = ("--w-bits", 4, "--weights", "rtn", "--no-check", "--no-verify")
IN_FLOAT = "--exclude {} leaves in float what {} names"


def types(path: Path) -> set[int]:
    return {initializer.data_type for initializer in onnx.load(path).graph.initializer if len(initializer.dims) == 2}


@pytest.mark.parametrize(
    ("named", "pattern", "tied"),
    [
        (("--lm-head", "int8"), "*lm_head*", False),
        (("--lm-head", "int4"), "*lm_head*", True),
        (("--embedding", "int8"), "*embed_tokens*", False),
        (("--int8-down-proj",), "*down_proj*", False),
    ],
)
def test_it_is_told(named: tuple[str, ...], pattern: str, tied: bool, tmp_path: Path, shell: Shell) -> None:
    source = exports.optimum_export("llama", tied=tied)
    said = shell.ok("quantize", source, tmp_path / "m.onnx", *LOW, *named, "--exclude", pattern).err
    assert IN_FLOAT.format(pattern, " ".join(named)) in said
    assert "8-bit weights alone" not in said
    assert types(tmp_path / "m.onnx") <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT4}
    told = shell.ok("quantize", source, tmp_path / "m.onnx", *LOW, *named).err
    assert "leaves in float" not in told


def test_a_part_of_them_is_done(tmp_path: Path, shell: Shell) -> None:
    source = exports.optimum_export("llama")
    said = shell.ok(
        "quantize",
        source,
        tmp_path / "m.onnx",
        *LOW,
        "--a-bits",
        8,
        "--int8-down-proj",
        "--exclude",
        "*layers.0*down_proj*",
    ).err
    assert "leaves in float" not in said
    assert onnx.TensorProto.UINT8 in types(tmp_path / "m.onnx")


def test_a_scheme_and_a_recipe(tmp_path: Path, shell: Shell) -> None:
    source, recipe = exports.optimum_export("llama"), tmp_path / "r.yaml"
    w8 = ("--scheme", "w8", "--no-rotate", "--no-check")
    said = shell.ok("quantize", source, tmp_path / "m.onnx", *w8, "--exclude", "*lm_head*", "--lm-head", "int8").err
    assert "leaves in float what --lm-head int8 names" in said
    recipe.write_text("weights: {bits: 4, method: rtn}\nlm_head: int8\nexclude: ['*lm_head*']\n")
    said = shell.ok("quantize", source, tmp_path / "r.onnx", "--recipe", recipe, "--no-check", "--no-verify").err
    assert "r.yaml: exclude" in said
    assert "lm_head" in said


def test_where_nothing_would_be_quantized(tmp_path: Path, shell: Shell) -> None:
    source = exports.optimum_export("llama")
    said = shell.ok(
        "quantize", source, tmp_path / "m.onnx", "--w-bits", 16, "--kv-bits", 8, "--exclude", "*q_proj*", "--no-check"
    ).err
    assert "--exclude *q_proj* has no effect: weights and activations stay in float" in said
