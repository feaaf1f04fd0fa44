"""The cache's shape of fused attention where the graph leaves it open and no config file tells."""

import shutil
from pathlib import Path

import exports
import pytest

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import rotate


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
