"""Files that a rotation names: what they leave unsaid, leave out, or are not there for."""

from pathlib import Path

import exports
import pytest

from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.config.rounding import GPTQConfig, RoundingConfig, RTNConfig
from quarot_onnx.config.spec import Int8Spec, QLayerConfig
from quarot_onnx.errors import ConfigError
from quarot_onnx.pipeline import quantize, rotate


@pytest.fixture
def llama_optimum() -> Path:
    return exports.optimum_export("llama")


@pytest.mark.parametrize("stated", ["", ', "R1": null', ', "online_pairs": []'])
def test_a_rotation_config_that_states_none(stated: str, llama_optimum: Path, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(f'{{"format": "quarot_onnx/1"{stated}}}')
    with pytest.raises(ConfigError, match=r'r\.json: it states no rotation that is done; state one, as "R1": "detect"'):
        rotate(llama_optimum, tmp_path / "a" / "model.onnx", QuarotConfig(r_config_path=tmp_path / "r.json"))


def test_a_rotation_config_that_leaves_all_out(llama_optimum: Path, tmp_path: Path) -> None:
    left_out = '"leave_out": {"R4": ["/model/layers.{layer}/mlp/down_proj/MatMul"]}'
    (tmp_path / "r.json").write_text(f'{{"format": "quarot_onnx/1", "R1": "detect", "R4": "detect", {left_out}}}')
    with pytest.raises(ConfigError, match=r"^leave_out\.R4 names every place of R4 in this model; leave R4 out"):
        rotate(llama_optimum, tmp_path / "a" / "model.onnx", QuarotConfig(r_config_path=tmp_path / "r.json"))


@pytest.mark.parametrize("method", [RTNConfig(), GPTQConfig()])
@pytest.mark.parametrize("key", ["r1_matrix_path", "r2_matrix_path"])
def test_a_matrix_that_is_not_there(key: str, method: RoundingConfig, tmp_path: Path) -> None:
    config = QConfig(QLayerConfig(weight=Int8Spec()), algo_config=[QuarotConfig(**{key: tmp_path / "r.npy"}), method])
    source = exports.optimum_export("llama")
    with pytest.raises(ConfigError, match=rf"^{key}.*r\.npy"):
        quantize(source, tmp_path / "q.onnx", config, TextReader(source, samples=1, seq_len=16))
