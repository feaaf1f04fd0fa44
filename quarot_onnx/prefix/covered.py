"""Whether a prefix that all known attentions read is read by all that attends in a graph."""

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from quarot_onnx.errors import ModelError, first_and_more
from quarot_onnx.graph.caches import FUSED_CACHES, forward, presents
from quarot_onnx.graph.linear import is_matmul
from quarot_onnx.graph.query import SIZE_ONLY, consumers, data_input, first_reader, label
from quarot_onnx.io.nodes import all_nodes
from quarot_onnx.sites.model import Attention
from quarot_onnx.sites.scores import context_product, score_product


def require_all(graph: ir.Graph, attentions: Sequence[Attention]) -> None:
    """Refuse a graph in which something attends that a prefix would not be put to.

    Args:
        graph: The graph.
        attentions: What was found in it.

    Raises:
        ModelError: Naming it.
    """
    found = {attention.node for attention in attentions}
    others = [label(node) for node in all_nodes(graph) if node not in found and _attends(node)]
    if others:
        raise ModelError(f"{first_and_more(others)} attends, too, and is no attention of the decoder that was found")
    strange = [first_reader(past) for past in _unread(graph, found)]
    if strange:
        raise ModelError(f"{first_and_more(strange)} takes a cache, and what attends to that is not understood")


def _attends(node: ir.Node) -> bool:
    if (node.domain, node.op_type) in FUSED_CACHES:
        return True
    return node.op_type == "Softmax" and score_product(data_input(node)) is not None


def _unread(graph: ir.Graph, attentions: set[ir.Node]) -> Iterator[ir.Value]:
    """The caches that come in and flow into none of the attentions."""
    readers = set[ir.Node | None](attentions)
    for node in attentions:
        if node.op_type == "Softmax":
            readers |= {score_product(data_input(node)), context_product(node.outputs[0])}
    for past in presents(graph):
        if not any(user in readers for value in forward([past], _kept) for user, _ in consumers(value)):
            yield past


def _kept(node: ir.Node, _: int) -> list[ir.Value]:
    """What a node makes of a cache; nothing where it attends to it, or may do so, or where a Linear reads it."""
    ends = node.op_type in SIZE_ONLY | {"Einsum", "Gemm", "Softmax"} or (node.domain, node.op_type) in FUSED_CACHES
    return [] if ends or is_matmul(node) or node.domain not in ("", "com.microsoft") else list(node.outputs)
