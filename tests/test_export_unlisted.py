"""Architectures that optimum does not list: exported and compared with the model in torch, or refused."""

import gc
import re
import weakref
from pathlib import Path
from typing import Any

import more_architectures
import numpy as np
import onnx
import onnxruntime
import pytest

from quarot_onnx.export import child, unlisted
from quarot_onnx.export.export import export
from quarot_onnx.export.loading import RefusalError

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and optimum, which the child does not show
SIZES = more_architectures.UNLISTED["glm4"]
NO_CACHE = "it does not keep keys and values, and nothing else, in each of its layers"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # In torch, attention differs with a mask of ones and with one that masks something.
    "doge": (SIZES, r"an export like a Llama's computes something else \(its logits are off by"),
    "llama4_text": (
        SIZES | {"num_local_experts": 4, "intermediate_size_mlp": 96},
        r"it cannot be exported as a Llama is \(.*polar",
    ),
    "dbrx": (
        {"vocab_size": 264, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
        "a trace leaves out the experts that none of its tokens chooses",
    ),
    "lfm2": (SIZES | {"full_attn_idxs": [1], "block_dim": 64, "conv_dim": 64}, NO_CACHE),
    "mamba": ({"vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, NO_CACHE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused(name: str, tmp_path: Path) -> None:
    sizes, reason = REFUSED[name]
    model = more_architectures.write_source(name, sizes, tmp_path / "hf")
    message = (
        rf"is of architecture '{name}', which optimum does not export with a cache, and {reason}.*; export it with"
    )
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
    assert re.search(
        r"does not export the architecture 'glm4' with a cache.* on 48 tokens.*logits differ by \d\.\de-\d\d$", note
    )
    session = onnxruntime.InferenceSession(path)
    assert {value.type for value in session.get_inputs() if "past" in value.name} == {
        f"tensor({'float' if dtype == 'fp32' else 'float16'})"
    }


def test_a_damaged_export_is_not_handed_out(tmp_path: Path) -> None:
    """The comparison sees a few rows of one weight that are larger by a fifth."""
    model = more_architectures.write_source("glm4", SIZES, tmp_path / "hf")
    comparison = unlisted.prepare(tmp_path / "hf", model)
    model.model.layers[1].mlp.down_proj.weight.data[:8] *= 1.2
    check = child.export_model(tmp_path / "hf", model, tmp_path / "out", None, lambda _message: None)
    assert check()
    with pytest.raises(RefusalError, match="computes something else"):
        comparison.check(tmp_path / "out")


def test_an_opset_that_is_asked_for_is_to_blame(tmp_path: Path) -> None:
    sizes, _ = REFUSED["llama4_text"]
    model = more_architectures.write_source("llama4_text", sizes, tmp_path / "hf")
    with pytest.raises(Exception, match="opset version 17 is not supported") as raised:
        child.export_model(tmp_path / "hf", model, tmp_path / "out", 17, lambda _message: None)
    message = child.failed(tmp_path / "hf", raised.value, 17)
    assert message["error"] == "config"
    assert message["text"].endswith("; choose another opset, or none, for the model's default")


EXPERTS = more_architectures.UNLISTED["dots1"] | {"n_routed_experts": 40, "num_local_experts": 40}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}


@pytest.mark.parametrize(
    ("name", "sizes", "weights"),
    [
        ("dots1", {"first_k_dense_replace": 1}, 40 * 3),
        ("deepseek_v3", {"first_k_dense_replace": 1, "head_dim": 8, "num_key_value_heads": 4, **LATENT}, 40 * 3),
        ("mixtral", {"intermediate_size": 32}, 2 * 40 * 3),
    ],
)
def test_experts_that_no_token_of_a_trace_chooses_are_in_the_graph(
    name: str, sizes: dict[str, Any], weights: int, tmp_path: Path
) -> None:
    """40 experts, of which 32 tokens choose two each. optimum lists DeepSeek-V3, and drops such experts."""
    model = more_architectures.write_source(name, EXPERTS | sizes, tmp_path / "hf")
    child.export_model(tmp_path / "hf", model, tmp_path / "out", None, lambda _message: None)()
    shapes = [sorted(value.dims) for value in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer]
    assert shapes.count([32, 64]) >= weights


def test_a_model_is_let_go_before_its_export_is_opened(tmp_path: Path) -> None:
    model = more_architectures.write_source("glm4", SIZES, tmp_path / "hf")
    alive = weakref.ref(model)
    check = child.export_model(tmp_path / "hf", model, tmp_path / "out", None, lambda _message: None)
    del model
    gc.collect()
    assert alive() is None
    assert check()


def test_positions_begin_behind_the_padding() -> None:
    mask = np.array([[1, 1, 1], [0, 0, 1]])
    assert unlisted.positions(mask).tolist() == [[0, 1, 2], [0, 0, 0]]


def test_decode_steps_are_held_against_their_own_tokens(tmp_path: Path) -> None:
    """Logits of the last two tokens alone are changed: the whole run is right, the decode steps are not."""
    model = more_architectures.write_source("glm4", SIZES, tmp_path / "hf")
    comparison = unlisted.prepare(tmp_path / "hf", model)
    child.export_model(tmp_path / "hf", model, tmp_path / "out", None, lambda _message: None)
    comparison.check(tmp_path / "out")
    comparison.texts[1].logits[:, -2:] *= 1.1
    with pytest.raises(RefusalError, match="computes something else"):
        comparison.check(tmp_path / "out")


def test_logits_that_are_no_numbers_are_no_agreement(tmp_path: Path) -> None:
    model = more_architectures.write_source("glm4", SIZES, tmp_path / "hf")
    comparison = unlisted.prepare(tmp_path / "hf", model)
    child.export_model(tmp_path / "hf", model, tmp_path / "out", None, lambda _message: None)
    comparison.texts[2].logits[:] = np.nan
    with pytest.raises(RefusalError, match="off by nan"):
        comparison.check(tmp_path / "out")
