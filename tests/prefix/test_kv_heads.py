"""A model with a prefix in its graph has the heads of keys and values that it had before."""

import json
from pathlib import Path

import exports
import onnx_ir as ir
import pytest
from command_line import Shell

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.config.algorithm import SinkPrefixConfig
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import WHOLE
from quarot_onnx.run.prefixing import put_prefix
from quarot_onnx.sites.detect import detect

EXPORTS = ("optimum llama", "optimum qwen2", "optimum MHA", "dynamo cache", "dynamo cache 23", "genai")
QUANTIZE = ("quantize", "--no-r2", "--no-r3", "--no-check", "--calib-samples", 2, "--calib-seq-len", 32)


def heads(model: ir.Model) -> list[tuple[int, int, int]]:
    attentions = detect(model).attentions
    return [(found.num_heads, found.num_kv_heads, found.head_dim) for found in attentions]


@pytest.mark.parametrize("export", EXPORTS)
def test_the_graph_tells_as_many_heads(export: str) -> None:
    source = exports.EXPORTS[export]()
    model = model_io.load(source)
    before = heads(model)
    put_prefix(model, source, SinkPrefixConfig(form="graph", ids=[256, 84]), source.parent, WHOLE)
    assert ModelInputs.from_model(model, folder=source.parent).has_cache
    assert heads(model) == before


@pytest.mark.parametrize("export", ["optimum llama", "optimum qwen2"])
def test_bytes_of_a_position_and_scales_of_a_file_are_of_these(
    export: str, tmp_path: Path, shell: Shell, text: Path
) -> None:
    source = exports.EXPORTS[export]()
    _, kv_heads, head_dim = heads(model_io.load(source))[0]
    scales = [[0.05] * (kv_heads * head_dim)] * 2
    file = tmp_path / "scales.json"
    file.write_text(json.dumps({"scales": {"k_scales": scales, "v_scales": scales}, "layer_ids": [0, 1]}))
    given = (*QUANTIZE, source, "--calib-text", text, "--kv-bits", 8, "--kv-scale-file", file)
    plain = shell.ok(*given, tmp_path / "plain" / "m.onnx").err
    behind = shell.ok(*given, tmp_path / "behind" / "m.onnx", "--prefix", "graph", "--prefix-ids", "256,84").err
    for said in (plain, behind):
        assert f"takes {4 * kv_heads * head_dim} bytes a position in place of {16 * kv_heads * head_dim}" in said
