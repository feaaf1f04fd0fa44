"""What a GGUF file holds is in the model that is made of it, or the file is refused."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StableLmConfig,
)

from quarot_onnx.export.export import export
from quarot_onnx.export.gguf_checks import check_file, check_settings
from quarot_onnx.export.gguf_source import load_gguf, normalise_experts
from quarot_onnx.export.loading import RefusalError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]])


def llama(*, tied: bool = False, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied, **config)).eval()


def logits(model: LlamaForCausalLM) -> np.ndarray:
    with torch.no_grad():
        return model(IDS).logits.numpy()


def factors() -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1's scaling: (8,)."""
    plain, scaled = llama(), llama(rope_scaling=LLAMA3)
    return (plain.model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq).numpy()


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_of_a_file(tied: bool, tmp_path: Path) -> None:
    original = llama(tied=tied)
    model, _, notes = load_gguf(gguf_files.write(tmp_path / "x.gguf", original), "fp32")
    assert not notes
    np.testing.assert_allclose(logits(model), logits(original), atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_factors_of_rotary_frequencies_are_kept(dtype: str, tmp_path: Path) -> None:
    original = llama(rope_scaling=LLAMA3)
    path = gguf_files.write(tmp_path / "x.gguf", original, {"rope_freqs.weight": factors()})
    model, _, (note,) = load_gguf(path, dtype)
    assert "rope_freqs.weight, the rotary scaling of x.gguf, is in the graph" in note
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)
    assert factors().max() == pytest.approx(8)


def test_they_are_in_the_exported_graph_and_told_of(tmp_path: Path) -> None:
    original = llama(rope_scaling=LLAMA3)
    path = gguf_files.write(tmp_path / "x.gguf", original, {"rope_freqs.weight": factors()})
    notes: list[str] = []
    out = export(path, tmp_path / "out", note=notes.append)
    assert "rope_freqs.weight" in notes[0]
    session = ort.InferenceSession(out)
    feeds = {"input_ids": IDS.numpy(), "attention_mask": np.ones_like(IDS), "position_ids": np.arange(11)[None]}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((1, 2, 0, 16), np.float32)
    found = session.run(["logits"], {name: np.asarray(value) for name, value in feeds.items()})[0]
    np.testing.assert_allclose(found, logits(original), atol=1e-5)
    assert np.abs(found - logits(llama())).max() > 1e-3
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("extra", "settings", "message"),
    [
        (
            {"blk.0.attn_q.bias": np.ones(64, np.float32)},
            {},
            r"holds blk\.0\.attn_q\.bias, for which transformers has no place in a LlamaForCausalLM .* without it the",
        ),
        (
            {"rope_factors_long.weight": np.ones(8, np.float32), "rope_factors_short.weight": np.ones(8, np.float32)},
            {},
            "holds rope_factors_long.weight, rope_factors_short.weight, .* without them",
        ),
        ({"rope_freqs.weight": np.ones(4, np.float32)}, {}, "holds 4 factors of rotary frequencies .* do not fit"),
        ({}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, r"has llama\.rope\.scaling\.type = linear"),
        ({}, {"rope.scale_linear": 4.0}, r"has llama\.rope\.scale_linear = 4\.0, .*; export the Hugging Face folder"),
        ({}, {"attention.scale": 0.5}, r"has llama\.attention\.scale = 0\.5"),
        ({}, {"expert_count": 8}, r"has llama\.expert_count = 8"),
        (
            {},
            {"block_count": 3},
            r"lacks model\.layers\.2\..* and 6 more, which a LlamaForCausalLM of its settings has",
        ),
        (
            {},
            {"feed_forward_length": 128},
            r"mlp.down_proj.weight, .* are of another shape .*; export the Hugging Face",
        ),
    ],
)
def test_what_would_be_left_out_is_refused_before_a_weight_is_read(
    extra: dict[str, np.ndarray],
    settings: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = gguf_files.write(tmp_path / "x.gguf", llama(), extra, settings)
    monkeypatch.setattr(gguf, "dequantize", lambda *_: pytest.fail("a weight was dequantized"))
    with pytest.raises(RefusalError, match=message):
        load_gguf(path, "fp32")


def test_a_window_of_attention_is_told_of(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "x.gguf", llama(), {}, {"attention.sliding_window": 32})
    _, _, (note,) = load_gguf(path, "fp32")
    assert note.startswith("llama.attention.sliding_window = 32 is not taken over from x.gguf: the export attends to")


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    model, tokenizer, (note,) = load_gguf(gguf_files.write(tmp_path / "x.gguf", llama(), ends=False), "fp32")
    assert tokenizer is None
    assert re.match(r"no tokenizer\.json was written, as transformers makes no tokenizer of x\.gguf \(.*bos", note)
    np.testing.assert_allclose(logits(model), logits(llama()), atol=1e-5)


def test_the_ends_of_a_text_are_those_of_the_file(tmp_path: Path) -> None:
    _, tokenizer, _ = load_gguf(gguf_files.write(tmp_path / "x.gguf", llama()), "fp32")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    tokenizer.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert (kept["bos_token"], kept["eos_token"]) == (chr(256), chr(257))
    assert len(tokenizer) == 128


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"general.architecture": "command-r"},
            "'command-r', which transformers cannot read .* it reads bloom, .*export",
        ),
        ({"general.architecture": "tokenizer"}, "of architecture 'tokenizer', which"),
        ({}, "of architecture 'none'"),
        ({"general.architecture": "llama", "split.count": 3}, "one of 3 parts .* .llama-gguf-split --merge"),
    ],
)
def test_files_that_are_no_model_of_transformers(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RefusalError, match=message):
        check_file(Path("x.gguf"), fields)


@pytest.mark.parametrize("architecture", ["llama", "qwen2moe", "qwen3moe", "gemma3"])
def test_files_that_are(architecture: str) -> None:
    sizes = {f"{architecture}.{key}": 2 for key in ("block_count", "embedding_length", "attention.head_count")}
    check_file(Path("x.gguf"), {"general.architecture": architecture, "split.count": 1, **sizes})
    for name in sizes:
        some = {key: value for key, value in sizes.items() if key != name}
        with pytest.raises(RefusalError, match=f"does not say how large the model is: it lacks {name}; fetch"):
            check_file(Path("x.gguf"), {"general.architecture": architecture, **some})


@pytest.mark.parametrize("asks", [True, False])
def test_a_token_in_front_that_the_file_does_not_ask_for_is_told_of(asks: bool, tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "x.gguf", llama(), {}, {"tokenizer.ggml.add_bos_token": asks})
    _, tokenizer, notes = load_gguf(path, "fp32")
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert [note[:37] for note in notes] == ([] if asks else ["x.gguf asks for no token in front of "])


def test_weights_of_chosen_experts_add_up_to_one() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4}
    model, expected = (
        Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**sizes, **heads, num_experts_per_tok=2, norm_topk_prob=normed, initializer_range=0.5)
        ).eval()
        for normed in (False, True)
    )
    expected.load_state_dict(model.state_dict())
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(ids).logits
        normalise_experts(model)
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)
        assert (before - expected(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (
            StableLmConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4, intermediate_size=32),
            {"stablelm.rope.freq_base": 500_000.0},
            r"has stablelm\.rope\.freq_base = 500000\.0, where the model that transformers makes of it has 10000",
        ),
        (
            StableLmConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4, intermediate_size=32),
            {"stablelm.rope.dimension_count": 16},
            r"has stablelm\.rope\.dimension_count = 16, where the model that transformers makes of it has 4",
        ),
        (
            Gemma2Config(num_hidden_layers=1, hidden_size=64, num_attention_heads=2, head_dim=32, intermediate_size=32),
            {"gemma2.attention.key_length": 32},
            "does not say by what scores are divided, and transformers takes 256 for heads of 32",
        ),
    ],
    ids=["base", "dimensions", "scores"],
)
def test_what_transformers_takes_its_own_default_for(
    config: PretrainedConfig, fields: dict[str, object], message: str
) -> None:
    config.vocab_size = 32
    model = AutoModelForCausalLM.from_config(config)
    architecture = {"general.architecture": next(iter(fields)).partition(".")[0]}
    with pytest.raises(RefusalError, match=message):
        check_settings(Path("x.gguf"), model, {**architecture, **fields})


def test_an_architecture_that_optimum_does_not_list(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "starcoder2")
    for add in (writer.add_embedding_length, writer.add_block_count, writer.add_head_count, writer.add_vocab_size):
        add(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        RefusalError, match=r"'starcoder2', of which no GGUF files are exported.*; export the Hugging F"
    ):
        load_gguf(tmp_path / "x.gguf", "fp32")


def test_settings_that_change_nothing_are_no_hindrance(tmp_path: Path) -> None:
    neutral = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "expert_count": 0, "logit_scale": 1.0}
    assert load_gguf(gguf_files.write(tmp_path / "x.gguf", llama(), {}, neutral), "fp32")[2] == []
