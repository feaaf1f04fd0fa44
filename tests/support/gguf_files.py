"""GGUF files of tiny Llamas, written as llama.cpp's converter does: in float32, queries and keys interleaved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(
    path: Path,
    model: LlamaForCausalLM,
    extra: Mapping[str, np.ndarray] = {},
    settings: Mapping[str, Any] = {},
    *,
    ends: bool = True,
) -> Path:
    """Write ``model`` with further tensors, and further settings of its architecture or tokenizer.

    Without ``ends``, no token begins or ends a text, and transformers makes no tokenizer of the file.

    Returns:
        ``path``.
    """
    config: LlamaConfig = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = [chr(number + 256) for number in range(config.vocab_size - 2)]
    tokens += [tokens[0] + tokens[1], tokens[2] + tokens[3]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}", f"{tokens[2]} {tokens[3]}"])
    if ends:
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    for key, value in settings.items():
        writer.kv_data[0].pop(f"llama.{key}", None)
        kinds = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
        kinds[type(value)](key if key.startswith("tokenizer.") else f"llama.{key}", value)
    for name, weight in model.state_dict().items():
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            writer.add_tensor(_name(name), np.ascontiguousarray(_interleaved(name, weight.numpy(), config)))
    for name, array in extra.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, suffix = name.rsplit(".", 1)
    if stem in whole:
        return f"{whole[stem]}.{suffix}"
    number, inner = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{_NAMES[inner]}.{suffix}"


def _interleaved(name: str, weight: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """Queries and keys with the two halves of a head in turns, as llama.cpp rotates neighbours."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)
