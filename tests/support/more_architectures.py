# ruff: noqa: PLC0415 -- torch takes seconds to import and is only needed while the cache is cold
"""Tiny models of architectures that no other test has, exported as optimum does those that it lists."""

from pathlib import Path
from typing import Any

from export_cache import cached
from exports import BOS, COMMON, EOS, SOURCES, VOCAB

from quarot_onnx.export import child, tracing, unlisted

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

_WINDOW = _HEADS | {"sliding_window": 8, "num_hidden_layers": 4}
_EXPERTS = _HEADS | {"moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}

UNLISTED: dict[str, dict[str, Any]] = {
    "biogpt": _IDS | {name: value for name, value in COMMON.items() if name != "num_key_value_heads"},
    "cohere2": _WINDOW,
    "dots1": _EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "ernie4_5": _HEADS,
    "exaone4": _WINDOW,
    "glm4": _HEADS,
    "hunyuan_v1_dense": _HEADS,
    "mixtral": _EXPERTS,
    "olmo3": _WINDOW,
    "olmoe": _EXPERTS,
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 32},
    "seed_oss": _HEADS,
    "starcoder2": _HEADS,
}
"""Those that optimum does not list."""


def write_source(name: str, sizes: dict[str, Any], source: Path) -> Any:
    """A Hugging Face folder of an architecture, with random weights, none of which is 0 or 1; returns its model."""
    import torch
    from tiny_models import write_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(0.2 * torch.randn_like(value))
            else:
                value.normal_(0, 1.2 * value.shape[-1] ** -0.5)
    model.save_pretrained(source)
    write_tokenizer(source)
    return model


def export(name: str) -> Path:
    """``model.onnx`` of one of ``ARCHITECTURES`` or ``UNLISTED``, with a cache."""
    sizes = {**ARCHITECTURES, **UNLISTED}[name]

    def build(folder: Path) -> None:
        from optimum.utils.save_utils import maybe_load_preprocessors

        source = folder / "hf"
        model = write_source(name, sizes, source)
        preprocessors = maybe_load_preprocessors(str(source))
        check = child.export_model(source, model, folder, None, lambda _message: None, preprocessors=preprocessors)
        assert len(check()) == (name in UNLISTED)
        child.complete(source, folder)

    sources = (*SOURCES, Path(__file__), *(Path(module.__file__ or "") for module in (child, tracing, unlisted)))
    return cached(f"more-{name}", {"name": name, **sizes}, build, sources) / "model.onnx"
