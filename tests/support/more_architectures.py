# ruff: noqa: PLC0415 -- torch takes seconds to import and is only needed while the cache is cold
"""Tiny models of architectures that no other test has, as optimum exports them."""

from pathlib import Path
from typing import Any

from export_cache import cached
from exports import BOS, COMMON, EOS, SOURCES, VOCAB

_IDS = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
_HEADS = COMMON | {"head_dim": 16}
_OLD = _IDS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "arcee": _HEADS,
    "bloom": _IDS | {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "cohere": _HEADS,
    "gemma2": _HEADS | {"query_pre_attn_scalar": 16, "sliding_window": 64},
    "glm": _HEADS,
    "gpt2": _OLD,
    "gpt_bigcode": _OLD,
    "gpt_oss": _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
    "granite": _HEADS
    | {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.06},
    "helium": _HEADS,
    "nemotron": _HEADS,
    "olmo": _HEADS,
    "opt": _IDS
    | {
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 64,
    },
    "smollm3": _HEADS,
    "stablelm": _HEADS,
}


def export(name: str) -> Path:
    """``model.onnx`` of one of ``ARCHITECTURES``, with a cache; no weight or bias is 0 or 1."""

    def build(folder: Path) -> None:
        import torch
        from optimum.exporters.onnx import main_export
        from tiny_models import write_tokenizer
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **ARCHITECTURES[name])).eval()
        with torch.no_grad():
            for value in model.parameters():
                if value.ndim == 1:
                    value.add_(0.2 * torch.randn_like(value))
                else:
                    value.normal_(0, 1.2 * value.shape[-1] ** -0.5)
        source = folder / "hf"
        model.save_pretrained(source)
        write_tokenizer(source)
        main_export(str(source), folder, task="text-generation-with-past", do_validation=False, local_files_only=True)

    parameters = {"name": name, **ARCHITECTURES[name]}
    return cached(f"more-{name}", parameters, build, (*SOURCES, Path(__file__))) / "model.onnx"
