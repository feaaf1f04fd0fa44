"""What a model is and what could be rotated in it, as data for ``inspect``."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from quarot_onnx.graph.linear import linears
from quarot_onnx.graph.query import label
from quarot_onnx.graph.saturation import saturable_products
from quarot_onnx.hadamard.orders import usual_block
from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.io.nodes import all_nodes
from quarot_onnx.processor import described, saturates
from quarot_onnx.sites.detect import QUANTIZED, inner_linears
from quarot_onnx.sites.model import Kind, Sites, grouped


@dataclass(frozen=True)
class HadamardUse:
    """One Hadamard that the rotations of a model need.

    Attributes:
        kind: "R1" to "R4".
        size: Its order.
        construction: How it is built.
        factors: Widths of the factors of an online rotation; empty for an offline one.
        cost: Multiply-adds per token of one online rotation, all of a layer's heads together; 0 for an offline one.
        relative_cost: ``cost`` in relation to the Linear behind it (R4) or to the O Linear (R3); 0 for an offline one.
    """

    kind: str
    size: int
    construction: str
    factors: tuple[int, ...]
    cost: int
    relative_cost: float


def hadamards(sites: Sites, blocks: Mapping[Kind, int]) -> Iterator[HadamardUse]:
    """The Hadamards of all four kinds, each size once.

    Args:
        sites: The places, all of them feasible.
        blocks: Blocks that were asked for.
    """
    if sites.norms:
        yield _offline("R1", sites.hidden_size, blocks.get(Kind.R1))
    for size in dict.fromkeys(a.head_dim for a in sites.r2):
        yield _offline("R2", size, None)
    for attention in {a.head_dim: a for a in sites.r3}.values():
        heads = attention.num_heads + attention.num_kv_heads
        width = attention.output.in_features * attention.output.out_features if attention.output else 0
        yield _online("R3", attention.head_dim, None, heads, width)
    for linear in {m.in_features: m for m in sites.mlps}.values():
        width = linear.in_features * linear.out_features
        yield _online("R4", linear.in_features, blocks.get(Kind.R4), 1, width)


def _rotation(size: int, block: int | None) -> Rotation:
    return Rotation.hadamard(size, block_size=block or usual_block(size))


def _offline(kind: str, size: int, block: int | None) -> HadamardUse:
    return HadamardUse(kind, size, _rotation(size, block).describe(), (), 0, 0.0)


def _online(kind: str, size: int, block: int | None, times: int, beside: int) -> HadamardUse:
    rotation = _rotation(size, block)
    online = rotation.online()
    cost = online.cost() * times
    widths = tuple(len(factor) for factor in online.factors)
    return HadamardUse(kind, size, rotation.describe(), widths, cost, cost / beside if beside else 0.0)


def quantized_record(model: ir.Model) -> dict[str, object]:
    """What ``inspect`` tells of a quantized model, JSON types only; reads int8 weights, one at a time."""
    nodes = Counter(node.op_type for node in all_nodes(model.graph))
    return {
        "quantized": {name: count for name, count in sorted(nodes.items()) if name in QUANTIZED},
        "saturating_products": len(saturable_products(model)),
        "processor": described(),
        "processor_saturates": saturates(),
        **_graph_record(model),
    }


def _graph_record(model: ir.Model) -> dict[str, object]:
    return {
        "nodes": len(model.graph),
        "opset": model.graph.opset_imports.get("", 0),
        "weight_bytes": sum(
            v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
        ),
        "linears_in_branches": [
            {"node": label(node), "op_type": node.op_type, "linears": len(inner)}
            for node in model.graph
            if (inner := inner_linears(node))
        ],
    }


def inspection_record(model: ir.Model, sites: Sites, blocks: Mapping[Kind, int]) -> dict[str, object]:
    """Everything that ``inspect`` tells, JSON types only.

    Args:
        model: The model.
        sites: Its places, all of them feasible.
        blocks: Blocks that were asked for.
    """
    first = sites.attentions[0] if sites.attentions else None
    return {
        "architecture": sites.architecture,
        "layers": sites.layers,
        "hidden_size": sites.hidden_size,
        "intermediate_size": sites.mlps[0].in_features if sites.mlps else 0,
        "head_dim": first.head_dim if first else 0,
        "num_heads": first.num_heads if first else 0,
        "num_kv_heads": first.num_kv_heads if first else 0,
        "vocab_size": sites.embeddings[0].table.shape[0] if sites.embeddings else 0,
        "tied_embeddings": sites.tied,
        "lm_head": [linear.name for linear in sites.head],
        "sites": sites.counts(),
        "left_out": [{"node": e.node, "reason": e.reason, "rotation": str(e.kind)} for e in sites.left_out],
        "left_out_grouped": [f"{kind} at {line}" for kind in Kind for line in grouped(sites.why_not(kind))],
        "hadamards": [
            {
                "rotation": use.kind,
                "size": use.size,
                "construction": use.construction,
                "factors": list(use.factors),
                "multiply_adds_per_token": use.cost,
                "relative_cost": use.relative_cost,
            }
            for use in hadamards(sites, blocks)
        ],
        "linears": sum(1 for _ in linears(model.graph)),
        **_graph_record(model),
    }
