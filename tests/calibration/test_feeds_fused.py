"""The cache's shape of fused attention where the graph leaves it open and no config file tells."""

import shutil
from pathlib import Path

import exports
import pytest
from lowbit_runs import LAYERS, config_for

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import quantize, rotate


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kinds", [{}, {"r1": True, "r3": True, "r4": True}])
def test_head_dim_comes_from_the_weights(tmp_path: Path, packed: bool, kinds: dict[str, bool]) -> None:
    source = exports.genai_like(packed_qkv=packed)
    expected = ModelInputs.from_path(source)
    target = tmp_path / "model.onnx"
    if kinds:
        rotate(source, target, QuarotConfig(**kinds))
        (tmp_path / "genai_config.json").unlink()
    else:
        for file in (source, source.with_name("model.onnx.data")):
            shutil.copy(file, tmp_path / file.name)
    found = ModelInputs.from_model(model_io.load(target))
    assert (found.kv_heads, found.head_dim) == (expected.kv_heads, expected.head_dim)


@pytest.mark.parametrize("name", ["genai", "genai qk-norm", "genai RoPE outside", "genai q, k, v bias"])
@pytest.mark.parametrize("form", LAYERS)
def test_head_dim_comes_from_quantized_weights(name: str, form: str, tmp_path: Path) -> None:
    source, target = exports.EXPORTS[name](), tmp_path / "model.onnx"
    expected = ModelInputs.from_path(source)
    quantize(source, target, config_for("rtn", form, quarot=QuarotConfig(r3=True)))
    found = ModelInputs.from_model(model_io.load(target))
    assert (found.kv_heads, found.head_dim) == (expected.kv_heads, expected.head_dim)
