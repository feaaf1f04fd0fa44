"""Architectures that optimum does not list: exported and compared with the model in torch, or refused."""

import re
from pathlib import Path
from typing import Any

import more_architectures
import numpy as np
import onnxruntime
import pytest

from quarot_onnx.errors import ModelError
from quarot_onnx.export import child, unlisted
from quarot_onnx.export.export import export
from quarot_onnx.export.loading import RefusalError

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and optimum, which the child does not show
SIZES = more_architectures.UNLISTED["glm4"]
NO_CACHE = "what it keeps of earlier tokens is no cache"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # In torch, attention differs with a mask of ones and with one that masks something.
    "doge": (SIZES, r"an export like a Llama's computes something else \(its logits are off by"),
    "llama4_text": (
        SIZES | {"num_local_experts": 4, "intermediate_size_mlp": 96},
        r"it cannot be exported as a Llama is \(.*polar",
    ),
    "lfm2": (SIZES | {"full_attn_idxs": [1], "block_dim": 64, "conv_dim": 64}, NO_CACHE),
    "mamba": ({"vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, NO_CACHE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused(name: str, tmp_path: Path) -> None:
    sizes, reason = REFUSED[name]
    model = more_architectures.write_source(name, sizes, tmp_path / "hf")
    message = rf"is of architecture '{name}', which optimum does not list, and {reason}.*; export it with torch\.onnx"
    with pytest.raises(RefusalError, match=message):
        child.export_model(tmp_path / "hf", model, tmp_path / "out", None, lambda _message: None)()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_folder_is_exported_with_a_note(dtype: str, tmp_path: Path) -> None:
    more_architectures.write_source("glm4", SIZES, tmp_path / "hf")
    notes: list[str] = []
    stages: list[str] = []
    path = export(tmp_path / "hf", tmp_path / "out", dtype=dtype, progress=stages.append, note=notes.append)  # type: ignore[arg-type]
    assert stages[-1] == "comparing it with the model in torch"
    (note,) = notes
    assert re.search(r"does not list the architecture 'glm4'.* on 48 tokens.*logits differ by \d\.\de-\d\d$", note)
    session = onnxruntime.InferenceSession(path)
    assert {value.type for value in session.get_inputs() if "past" in value.name} == {
        f"tensor({'float' if dtype == 'fp32' else 'float16'})"
    }


def test_a_damaged_export_is_not_handed_out(tmp_path: Path) -> None:
    """The comparison sees a weight that is another one, and a source that is left as it was."""
    model = more_architectures.write_source("glm4", SIZES, tmp_path / "hf")
    comparison = unlisted.prepare(tmp_path / "hf", model)
    model.model.layers[1].mlp.down_proj.weight.data[:8] *= 1.2
    check = child.export_model(tmp_path / "hf", model, tmp_path / "out", None, lambda _message: None)
    assert check()
    with pytest.raises(RefusalError, match="computes something else"):
        comparison.check(tmp_path / "out")


def test_an_opset_that_is_asked_for_is_named(tmp_path: Path) -> None:
    sizes, _ = REFUSED["llama4_text"]
    more_architectures.write_source("llama4_text", sizes, tmp_path / "hf")
    with pytest.raises(ModelError, match=r"'llama4_text', .*opset version 17 is not supported.*; export it with torch"):
        export(tmp_path / "hf", tmp_path / "out", opset=17)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_positions_begin_behind_the_padding() -> None:
    mask = np.array([[1, 1, 1], [0, 0, 1]])
    assert unlisted.positions(mask).tolist() == [[0, 1, 2], [0, 0, 0]]
