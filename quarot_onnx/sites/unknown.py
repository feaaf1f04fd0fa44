"""Attentions in a spelling that is not understood: R2 and R3 have no place there, R1 and R4 need none.

A decoder in which no attention is found may still have a residual stream. What stands for an attention before one of
its writers is then the nearest Softmax, or the nearest operator beyond ONNX's own that takes several operands.
"""

from collections.abc import Iterator

import onnx_ir as ir

from quarot_onnx.graph.linear import Linear
from quarot_onnx.graph.query import label
from quarot_onnx.io.opsets import STANDARD_DOMAINS
from quarot_onnx.sites.model import Attention, Kind, LeftOut
from quarot_onnx.sites.stream import Stream

_LEAST_OPERANDS = 3
_NO_ATTENTION = frozenset({"FusedMatMul", "RotaryEmbedding"})


def unknown_attentions(stream: Stream) -> tuple[list[Attention], list[LeftOut]]:
    """What seems to be an attention before the writers of a stream.

    Args:
        stream: A stream in whose graph no attention was understood.

    Returns:
        The attentions, of which nothing but the node is known, and why R2 and R3 cannot go there.
    """
    nodes = dict.fromkeys(node for writer in stream.writers if (node := _nearest(writer, stream)) is not None)
    reason = "it seems to be an attention, but how it reads Q, K and V is not understood"
    left_out = [
        LeftOut(label(node), f"this {node.op_type} is left alone: {reason}", kind)
        for node in nodes
        for kind in (Kind.R2, Kind.R3)
    ]
    return [Attention(node, 0, 0, 0, None, 0, None, None) for node in nodes], left_out


def _nearest(writer: Linear, stream: Stream) -> ir.Node | None:
    """The first node on the way back from a writer that seems to be an attention; None in an MLP."""
    for node in _before(writer.input, stream.values):
        several = sum(value is not None for value in node.inputs) >= _LEAST_OPERANDS
        foreign = node.domain not in STANDARD_DOMAINS and node.op_type not in _NO_ATTENTION
        if node.op_type == "Softmax" or (several and foreign):
            return node
    return None


def _before(value: ir.Value, stop: set[ir.Value]) -> Iterator[ir.Node]:
    """The nodes that a value is computed from, nearest first, up to those (norms) that read values in ``stop``."""
    seen, frontier = {value}, [value]
    while frontier:
        current = frontier.pop(0)
        node = current.producer()
        if node is not None and not any(v in stop for v in (current, *node.inputs)):
            yield node
            fresh = [v for v in node.inputs if v is not None and v not in seen]
            seen.update(fresh)
            frontier.extend(fresh)
