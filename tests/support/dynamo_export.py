"""``torch.onnx.export(dynamo=True)`` of a transformers model, with or without a cache, and of fused ops."""

from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F  # noqa: N812
from transformers import DynamicCache


class Logits(nn.Module):
    """input_ids, attention_mask: [batch, sequence] -> logits: [batch, sequence, vocab]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


class LogitsAndCache(nn.Module):
    """past: key, value, key, ... [batch, KV heads, past, head_dim] each; returned grown by the sequence."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        pairs = tuple(zip(past[::2], past[1::2], strict=True))
        cache = DynamicCache.from_legacy_cache(pairs)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
        return (out.logits, *present)


def trace(model: Any, *, opset: int, with_cache: bool) -> Any:
    """Export ``model`` (weights and dtype as they are).

    Args:
        model: A transformers causal language model.
        opset: Opset of the standard domain.
        with_cache: Whether the graph takes and returns the key/value cache.

    Returns:
        The ``torch.onnx.ONNXProgram``.
    """
    ids = torch.ones(2, 7, dtype=torch.int64)
    batch, sequence = Dim.DYNAMIC, Dim.DYNAMIC
    if not with_cache:
        shapes = {"input_ids": {0: batch, 1: sequence}, "attention_mask": {0: batch, 1: sequence}}
        return torch.onnx.export(
            Logits(model).eval(),
            (ids, torch.ones_like(ids)),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
        )
    config = model.config
    heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers
    past = [torch.zeros(2, heads, 5, head_dim, dtype=model.dtype) for _ in range(2 * layers)]
    names = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    return torch.onnx.export(
        LogitsAndCache(model).eval(),
        (ids, torch.ones(2, 12, dtype=torch.int64), torch.arange(5, 12).expand(2, -1), past),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes={
            "input_ids": {0: batch, 1: sequence},
            "attention_mask": {0: batch, 1: Dim.DYNAMIC},
            "position_ids": {0: batch, 1: sequence},
            "past": [{0: batch, 2: Dim.DYNAMIC} for _ in past],
        },
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
    )


class FusedBlock(nn.Module):
    """A pre-norm Llama block on ``nn.RMSNorm``, ONNX's RotaryEmbedding and ``scaled_dot_product_attention``."""

    def __init__(self, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.attention_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.q = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.v = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.o = nn.Linear(heads * head_dim, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.gate = nn.Linear(hidden, intermediate, bias=False)
        self.up = nn.Linear(hidden, intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        y = self.attention_norm(x)
        q, k, v = (
            linear(y).unflatten(-1, (count, self.head_dim)).transpose(1, 2)
            for linear, count in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        q, k = (torch.onnx.ops.rotary_embedding(t, cos, sin, positions) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(-2))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class FusedDecoder(nn.Module):
    """input_ids: [batch, sequence] -> logits: [batch, sequence, vocab], causal."""

    def __init__(
        self, vocab: int, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(FusedBlock(hidden, intermediate, heads, kv_heads, head_dim) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.head = nn.Linear(hidden, vocab, bias=False)
        frequency = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.arange(128)[:, None] * frequency
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin, positions)
        return self.head(self.norm(x))


def trace_fused(*, vocab: int, layers: int, seed: int) -> Any:
    """The decoder above at opset 23: RMSNormalization, RotaryEmbedding and Attention nodes."""
    model = FusedDecoder(vocab, layers, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, value in sorted(model.named_parameters()):
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(noise * value.shape[1] ** -0.5 if value.ndim == 2 else 1 + 0.3 * noise.clamp(-2, 2))
        model.embedding.weight.mul_(8.0)
    ids = torch.ones(2, 7, dtype=torch.int64)
    shapes = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    return torch.onnx.export(
        model,
        (ids,),
        dynamo=True,
        opset_version=23,
        dynamic_shapes=shapes,
        input_names=["input_ids"],
        output_names=["logits"],
    )
