# ruff: noqa: PLC0415 -- torch takes seconds to import and is only needed while the cache is cold
"""Tiny language models through the real exporters, kept on disk between test runs.

Every builder returns the path of a ``model.onnx`` with ``tokenizer.json`` (byte-level) beside it. The folder lies in
pytest's cache under a name made of the parameters, the exporters' versions and this code: a cold cache is filled when
asked, a warm one costs a ``stat``, ``pytest --cache-clear`` empties it. The folders are shared: never write there.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export_cache import cached

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("exports.py", "tiny_models.py", "dynamo_export.py", "genai_graph.py"))

BOS, EOS, VOCAB = 256, 257, 264  # ids below BOS are bytes, those above EOS unused

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
# 296 = 148 * 2 needs the Hadamard matrix of order 148, 48 and 96 that of order 12. Where head_dim is given it is not
# hidden_size / num_attention_heads.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "qwen2": {"intermediate_size": 296},
    "qwen3": {"hidden_size": 48, "head_dim": 16},
    "mistral": {"head_dim": 8, "sliding_window": None},
    "phi3": {"original_max_position_embeddings": 128},
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 64,
        "layer_types": ["full_attention"] * 2,
    },
    "olmo2": {},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "gpt_neox": {"rotary_pct": 1.0, "use_parallel_residual": False},
}


def hf_folder(arch: str, *, tied: bool = False, seed: int = 0, **config: Any) -> Path:
    """The folder ``save_pretrained`` writes: config.json, model.safetensors, tokenizer.json."""

    def build(folder: Path) -> None:
        from tiny_models import hf_model, write_tokenizer

        hf_model(arch, tied=tied, seed=seed, **config).save_pretrained(folder)
        write_tokenizer(folder)

    return cached(f"hf-{arch}", {"tied": tied, "seed": seed, **config}, build, SOURCES)


def optimum_export(arch: str, *, tied: bool = False, dtype: str = "fp32", seed: int = 0, **config: Any) -> Path:
    """``optimum-cli export onnx --task text-generation-with-past``: opset 18, TorchScript names, a cache.

    Args:
        arch: A key of ``ARCHITECTURES``.
        tied: One table for the embedding and the head.
        dtype: ``fp32`` or ``fp16``.
        seed: Of the weights.
        config: Overrides of the transformers config, such as ``num_key_value_heads=4``.

    Returns:
        Path of ``model.onnx``; inputs input_ids, attention_mask, position_ids (not Gemma), past_key_values.*.
    """

    def build(folder: Path) -> None:
        from optimum.exporters.onnx import main_export

        source = hf_folder(arch, tied=tied, seed=seed, **config)
        main_export(
            str(source),
            folder,
            task="text-generation-with-past",
            dtype=dtype,
            do_validation=False,
            local_files_only=True,
        )

    parameters = {"tied": tied, "dtype": dtype, "seed": seed, **config}
    return cached(f"optimum-{arch}", parameters, build, SOURCES) / "model.onnx"


def dynamo_export(
    arch: str,
    *,
    opset: int = 20,
    with_cache: bool = False,
    attention: str = "sdpa",
    tied: bool = False,
    dtype: str = "fp32",
    seed: int = 0,
    **config: Any,
) -> Path:
    """``torch.onnx.export(dynamo=True)`` of the logits, with external data as that exporter writes it.

    Args:
        arch: A key of ``ARCHITECTURES``.
        opset: 20 decomposes everything; 23 has Attention, RMSNormalization and RotaryEmbedding (without position_ids,
            which come with the cache, that one runs at batch 1 only).
        with_cache: past_key_values.* inputs and present.* outputs, and position_ids.
        attention: ``sdpa`` or ``eager``, as transformers names its implementations.
        tied: One table for the embedding and the head.
        dtype: ``fp32`` or ``fp16``.
        seed: Of the weights.
        config: Overrides of the transformers config.

    Returns:
        Path of ``model.onnx``; inputs input_ids and attention_mask first.
    """

    def build(folder: Path) -> None:
        import torch
        from dynamo_export import trace
        from tiny_models import hf_model, write_tokenizer

        model = hf_model(arch, tied=tied, seed=seed, attention=attention, **config)
        model.to({"fp32": torch.float32, "fp16": torch.float16}[dtype])
        trace(model, opset=opset, with_cache=with_cache).save(folder / "model.onnx", external_data=True)
        model.config.save_pretrained(folder)
        write_tokenizer(folder)

    parameters = {
        "opset": opset,
        "with_cache": with_cache,
        "attention": attention,
        "tied": tied,
        "dtype": dtype,
        "seed": seed,
        **config,
    }
    return cached(f"dynamo-{arch}", parameters, build, SOURCES) / "model.onnx"


def opset23_module_export(*, layers: int = 2, seed: int = 0) -> Path:
    """A ``torch.nn`` decoder at opset 23: RMSNormalization, RotaryEmbedding, Attention; the only input is input_ids."""

    def build(folder: Path) -> None:
        from dynamo_export import trace_fused
        from tiny_models import write_tokenizer

        trace_fused(vocab=VOCAB, layers=layers, seed=seed).save(folder / "model.onnx", external_data=True)
        write_tokenizer(folder)

    return cached("opset23-module", {"layers": layers, "seed": seed}, build, SOURCES) / "model.onnx"


def genai_like(
    *,
    layers: int = 2,
    packed_qkv: bool = True,
    bias: bool = False,
    qk_norm: bool = False,
    rotary_outside: bool = False,
    tied_transposed: bool = True,
    dtype: str = "fp32",
    seed: int = 0,
) -> Path:
    """A graph in the spelling of the onnxruntime-genai builder; by hand, as that needs another transformers.

    Args:
        layers: Number of decoder blocks.
        packed_qkv: One MatMul for Q, K and V; otherwise three.
        bias: Q, K and V get a bias (one Add when packed).
        qk_norm: RMS norm per head on Q and K; unpacks QKV.
        rotary_outside: com.microsoft RotaryEmbedding nodes on Q and K, ``do_rotary=0`` and a
            position_ids input; unpacks QKV.
        tied_transposed: The embedding gathers from a Transpose of the head's weight; otherwise two tables.
        dtype: ``fp32`` or ``fp16``.
        seed: Of the weights.

    Returns:
        Path of ``model.onnx`` with ``genai_config.json`` and external data beside it; inputs input_ids,
        attention_mask, past_key_values.*
    """
    parameters = {
        "layers": layers,
        "packed_qkv": packed_qkv and not qk_norm and not rotary_outside,
        "bias": bias,
        "qk_norm": qk_norm,
        "rotary_outside": rotary_outside,
        "tied_transposed": tied_transposed,
        "dtype": dtype,
        "seed": seed,
    }

    def build(folder: Path) -> None:
        from genai_graph import write
        from tiny_models import write_tokenizer

        write(folder, vocab=VOCAB, **parameters)
        write_tokenizer(folder)

    return cached("genai", parameters, build, SOURCES) / "model.onnx"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct of the packaged GGUF, exported: 539 MB, about a minute when cold."""
    import quarot_onnx.export
    from quarot_onnx.export.export import export, packaged_model

    def build(folder: Path) -> None:
        built = export(packaged_model(), folder / "export").parent
        for path in built.iterdir():
            path.rename(folder / path.name)
        built.rmdir()

    room = Path(quarot_onnx.export.__file__).parent
    return cached("smollm2", {}, build, [room / "child.py", room / "loading.py"]) / "model.onnx"


O, D, G = optimum_export, dynamo_export, genai_like  # noqa: E741

EXPORTS: dict[str, Callable[[], Path]] = {
    "optimum llama": lambda: O("llama"),
    "optimum tied": lambda: O("llama", tied=True),
    "optimum MHA": lambda: O("llama", num_key_value_heads=4),
    "optimum fp16": lambda: O("llama", dtype="fp16"),
    "optimum qwen2": lambda: O("qwen2"),
    "optimum qwen3": lambda: O("qwen3"),
    "optimum mistral": lambda: O("mistral"),
    "optimum phi3": lambda: O("phi3"),
    "optimum gemma3": lambda: O("gemma3_text"),
    "optimum olmo2": lambda: O("olmo2"),
    "optimum gpt_neox": lambda: O("gpt_neox"),
    "optimum MoE": lambda: O("qwen3_moe"),
    "dynamo llama": lambda: D("llama"),
    "dynamo eager": lambda: D("llama", attention="eager"),
    "dynamo tied": lambda: D("llama", tied=True),
    "dynamo 23": lambda: D("llama", opset=23),
    "dynamo fp16": lambda: D("llama", dtype="fp16"),
    "dynamo cache": lambda: D("qwen2", with_cache=True),
    "dynamo cache 23": lambda: D("qwen2", with_cache=True, opset=23),
    "dynamo phi3": lambda: D("phi3"),
    "dynamo gpt_neox": lambda: D("gpt_neox"),
    "opset 23 operators": opset23_module_export,
    "genai": G,
    "genai q, k, v bias": lambda: G(packed_qkv=False, bias=True),
    "genai packed bias": lambda: G(bias=True),
    "genai RoPE outside": lambda: G(rotary_outside=True),
    "genai qk-norm": lambda: G(qk_norm=True),
    "genai two tables": lambda: G(tied_transposed=False),
    "genai fp16": lambda: G(dtype="fp16"),
}
"""Every spelling of a graph that is exported here, by name."""
