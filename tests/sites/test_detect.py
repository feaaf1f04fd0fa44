"""Sites are found by structure, in every exporter's spelling, and no name takes part."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import onnx_ir as ir
import pytest
from renaming import rename_all

from quarot_onnx.io import model_io
from quarot_onnx.sites.detect import detect
from quarot_onnx.sites.model import Kind, Sites

O, D, G = exports.optimum_export, exports.dynamo_export, exports.genai_like  # noqa: E741
CACHE = {"with_cache": True}

# builder, (R1, R2, R3, R4), hidden size, (heads, KV heads, head_dim), tied, architecture
CASES: dict[str, tuple[Callable[[], Path], tuple[int, ...], int, tuple[int, ...], bool, str]] = {
    "optimum llama": (lambda: O("llama"), (5, 2, 2, 2), 64, (4, 2, 32), False, "llama"),
    "optimum tied": (lambda: O("llama", tied=True), (5, 2, 2, 2), 64, (4, 2, 32), True, "llama"),
    "optimum MHA": (lambda: O("llama", num_key_value_heads=4), (5, 2, 2, 2), 64, (4, 4, 32), False, "llama"),
    "optimum fp16": (lambda: O("llama", dtype="fp16"), (5, 2, 2, 2), 64, (4, 2, 32), False, "llama"),
    "optimum qwen2": (lambda: O("qwen2"), (5, 2, 2, 2), 64, (4, 2, 16), False, "qwen2"),
    "optimum qwen3": (lambda: O("qwen3"), (5, 2, 2, 2), 48, (4, 2, 16), False, "qwen3"),
    "optimum mistral": (lambda: O("mistral"), (5, 2, 2, 2), 64, (4, 2, 8), False, "llama"),
    "optimum phi3": (lambda: O("phi3"), (5, 2, 2, 2), 64, (4, 2, 16), False, "phi3"),
    "optimum gemma3": (lambda: O("gemma3_text"), (0, 2, 2, 2), 64, (4, 2, 32), False, "gemma3"),
    "optimum olmo2": (lambda: O("olmo2"), (0, 2, 2, 2), 64, (4, 2, 16), False, "olmo2"),
    "optimum gpt_neox": (lambda: O("gpt_neox"), (0, 0, 2, 2), 64, (4, 4, 16), False, "decoder with LayerNorm"),
    "dynamo llama": (lambda: D("llama"), (5, 2, 2, 2), 64, (4, 2, 32), False, "llama"),
    "dynamo eager": (lambda: D("llama", attention="eager"), (5, 2, 2, 2), 64, (4, 2, 32), False, "llama"),
    "dynamo tied": (lambda: D("llama", tied=True), (5, 2, 2, 2), 64, (4, 2, 32), True, "llama"),
    "dynamo 23": (lambda: D("llama", opset=23), (5, 2, 2, 2), 64, (4, 2, 32), False, "llama"),
    "dynamo fp16": (lambda: D("llama", dtype="fp16"), (5, 2, 2, 2), 64, (4, 2, 32), False, "llama"),
    "dynamo qwen2": (lambda: D("qwen2"), (5, 2, 2, 2), 64, (4, 2, 16), False, "qwen2"),
    "dynamo cache": (lambda: D("qwen2", **CACHE), (5, 2, 2, 2), 64, (4, 2, 16), False, "qwen2"),
    "dynamo cache 23": (lambda: D("qwen2", opset=23, **CACHE), (5, 2, 2, 2), 64, (4, 2, 16), False, "qwen2"),
    "dynamo cache eager": (
        lambda: D("qwen2", attention="eager", **CACHE),
        (5, 2, 2, 2),
        64,
        (4, 2, 16),
        False,
        "qwen2",
    ),
    "dynamo qwen3": (lambda: D("qwen3"), (5, 2, 2, 2), 48, (4, 2, 16), False, "qwen3"),
    "dynamo phi3": (lambda: D("phi3"), (5, 2, 2, 2), 64, (4, 2, 16), False, "phi3"),
    "dynamo gemma3": (lambda: D("gemma3_text"), (0, 2, 2, 2), 64, (4, 2, 32), False, "gemma3"),
    "dynamo olmo2": (lambda: D("olmo2"), (0, 2, 2, 2), 64, (4, 2, 16), False, "olmo2"),
    "dynamo gpt_neox": (lambda: D("gpt_neox"), (0, 0, 2, 2), 64, (4, 4, 16), False, "decoder with LayerNorm"),
    "opset 23 operators": (exports.opset23_module_export, (5, 2, 2, 2), 64, (4, 2, 32), False, "llama"),
    "genai": (G, (5, 2, 2, 2), 64, (4, 2, 32), True, "llama"),
    "genai bias": (lambda: G(bias=True), (5, 2, 2, 2), 64, (4, 2, 32), True, "qwen2"),
    "genai q, k, v": (lambda: G(packed_qkv=False), (5, 2, 2, 2), 64, (4, 2, 32), True, "llama"),
    "genai q, k, v bias": (lambda: G(packed_qkv=False, bias=True), (5, 2, 2, 2), 64, (4, 2, 32), True, "qwen2"),
    "genai RoPE outside": (lambda: G(rotary_outside=True), (5, 2, 2, 2), 64, (4, 2, 32), True, "llama"),
    "genai qk-norm": (lambda: G(qk_norm=True), (5, 2, 2, 2), 64, (4, 2, 32), True, "qwen3"),
    "genai two tables": (lambda: G(tied_transposed=False), (5, 2, 2, 2), 64, (4, 2, 32), False, "llama"),
    "genai fp16": (lambda: G(dtype="fp16"), (5, 2, 2, 2), 64, (4, 2, 32), True, "llama"),
}


def structure(model: ir.Model, sites: Sites) -> dict[str, Any]:
    """Everything in ``sites``, with nodes as numbers and without a name."""
    place = {node: number for number, node in enumerate(model.graph)}

    def linear(item: Any) -> Any:
        return item and (place[item.node], item.weight.shape, item.bias and (place[item.bias.node], item.bias.index))

    def previous(item: Any) -> Any:
        return place[item.node] if hasattr(item, "table") else linear(item)

    def made(value: ir.Value | None) -> Any:
        producer = value.producer() if value is not None else None
        return None if value is None or producer is None else (place[producer], value.index())

    return {
        "embeddings": [place[e.node] for e in sites.embeddings],
        "norms": [
            ([*map(previous, s.previous)], place[s.norm.node], [*map(linear, s.readers)]) for s in sites.norms
        ],
        "writers": [*map(linear, sites.writers)],
        "mlps": [*map(linear, sites.mlps)],
        "head": [*map(linear, sites.head)],
        "attentions": [
            (
                (place[a.node], a.num_heads, a.num_kv_heads, a.head_dim, a.value_start),
                (linear(a.value), linear(a.output)),
                a.heads and (made(a.heads.query), made(a.heads.key), a.heads.fused and place[a.heads.fused]),
            )
            for a in sites.attentions
        ],
        "left out": [entry.kind for entry in sites.left_out],
        "whole": (sites.layers, sites.hidden_size, sites.tied, sites.architecture),
    }  # fmt: skip


@functools.cache
def structure_as_exported(case: str) -> dict[str, Any]:
    model = model_io.load(CASES[case][0]())
    return structure(model, detect(model))


@pytest.mark.parametrize("case", CASES)
def test_every_export_as_it_is(case: str) -> None:
    build, counts, hidden, heads, tied, architecture = CASES[case]
    sites = detect(model_io.load(build()))
    assert tuple(sites.counts().values()) == counts
    assert (sites.layers, sites.hidden_size, sites.tied, sites.architecture) == (2, hidden, tied, architecture)
    assert {(a.num_heads, a.num_kv_heads, a.head_dim) for a in sites.attentions} == {heads}
    assert len(sites.writers) == 4
    assert len(sites.embeddings) == 1
    assert [linear.out_features for linear in sites.head] == [exports.VOCAB]
    assert {entry.kind for entry in sites.left_out} == {k for k, n in zip(Kind, counts, strict=True) if n == 0}


@pytest.mark.parametrize("node_names", [True, False], ids=["renamed", "nodes unnamed"])
@pytest.mark.parametrize("case", CASES)
def test_names_take_no_part(case: str, node_names: bool) -> None:
    renamed = model_io.load(CASES[case][0]())
    rename_all(renamed, node_names=node_names)
    assert structure(renamed, detect(renamed)) == structure_as_exported(case)


def test_what_is_read_and_written_at_each_norm() -> None:
    sites = detect(model_io.load(exports.optimum_export("llama")))
    first, second, *_, last = sites.norms
    assert [item.name for item in first.previous] == ["/model/embed_tokens/Gather"]
    projections = [f"/model/layers.0/self_attn/{part}_proj/MatMul" for part in "qkv"]
    assert sorted(linear.name for linear in first.readers) == sorted(projections)
    assert [item.name for item in second.previous] == ["/model/layers.0/self_attn/o_proj/MatMul"]
    assert [linear.name for linear in sites.mlps] == [f"/model/layers.{i}/mlp/down_proj/MatMul" for i in (0, 1)]
    assert [linear.name for linear in last.readers] == ["/lm_head/MatMul"]


def test_merged_projections_tell_their_columns() -> None:
    phi3 = detect(model_io.load(exports.optimum_export("phi3"))).attentions[0]
    assert phi3.value is not None
    assert (phi3.value.out_features, phi3.value_start, phi3.value_stop) == (128, 96, 128)
    genai = detect(model_io.load(exports.genai_like())).attentions[0]
    assert genai.value is not None
    assert (genai.value.out_features, genai.value_start, genai.value_stop) == (256, 192, 256)


def test_detection_reads_no_weight() -> None:
    model = model_io.load(exports.optimum_export("llama"))
    large = [v.const_value for v in model.graph.initializers.values() if v.const_value and v.const_value.size > 64]
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in large)
    detect(model)
    assert all(tensor.raw is None for tensor in large if isinstance(tensor, ir.ExternalTensor))
