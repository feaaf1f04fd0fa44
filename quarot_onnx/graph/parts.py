"""A part of a graph as a model of its own: some of its nodes, and the constants that they read.

What depends on no input (weights that are transposed, thousands of small constants) is computed anew in every part that
reads it, so that none of it need be handed from part to part.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import onnx_ir as ir

from quarot_onnx.graph.query import SIZE_ONLY, operands


class Parts:
    """Makes parts of a model, which is not changed and must not be until the last one was made."""

    def __init__(self, model: ir.Model, moves: Callable[[ir.Value], bool]) -> None:
        """Note the order of the nodes.

        Args:
            model: The model.
            moves: Whether a value depends on an input.
        """
        self._model, self._moves = model, moves
        self._order = {node: i for i, node in enumerate(model.graph)}

    def part(
        self, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value], name: str, also: Iterable[ir.Value] = ()
    ) -> tuple[ir.Model, list[ir.Value], Mapping[ir.Node, ir.Node]]:
        """A model of some nodes.

        Args:
            nodes: The nodes, in graph order.
            outputs: What it puts out.
            name: Of the graph.
            also: Values that it takes beside those that its nodes read.

        Returns:
            The model, the values that it takes in the whole graph, and the copy of each node.
        """
        inside = {output for node in nodes for output in node.outputs}
        read = (v for node in nodes for v in operands(node))
        needed = dict.fromkeys(v for v in (*read, *outputs, *also) if v not in inside)
        inputs = [v for v in needed if self._moves(v)]
        constants, initializers = self._constants([v for v in needed if not self._moves(v)])
        view = ir.GraphView(
            inputs,
            list(outputs),
            nodes=[*constants, *nodes],
            initializers=initializers,
            opset_imports=self._model.graph.opset_imports,
            name=name,
        )
        graph = view.clone()
        copies = dict(zip((*constants, *nodes), graph, strict=True))
        return ir.Model(graph, ir_version=self._model.ir_version), inputs, copies

    def _constants(self, values: list[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
        """The nodes that compute constant values, in graph order, and the initializers that they and others read."""
        nodes, initializers = constants_behind(values)
        return sorted(nodes, key=self._order.__getitem__), list(initializers)


def constants_behind(values: Iterable[ir.Value]) -> tuple[set[ir.Node], dict[ir.Value, None]]:
    """The nodes that compute constant values, and the initializers that they and others read."""
    nodes: set[ir.Node] = set()
    initializers: dict[ir.Value, None] = {}
    frontier = list(values)
    while frontier:
        value = frontier.pop()
        node = value.producer()
        if node is None:
            initializers[value] = None
        elif node not in nodes:
            nodes.add(node)
            frontier.extend(operands(node))
    return nodes, initializers


def nodes_behind(values: Iterable[ir.Value], *, through_sizes: bool = True) -> set[ir.Node]:
    """The nodes that values depend on; without ``through_sizes`` not by the shape of something alone."""
    found: set[ir.Node] = set()
    frontier = list(values)
    while frontier:
        node = frontier.pop().producer()
        if node is not None and node not in found and (through_sizes or node.op_type not in SIZE_ONLY):
            found.add(node)
            frontier.extend(operands(node))
    return found


def drop_unused(graph: ir.Graph) -> None:
    """Remove nodes and initializers that lead to no output, in place; nodes that stay keep all of theirs.

    An output that nobody reads may say what an operator does: some give the present only where it is asked for, and
    take a past only then.
    """
    for node in reversed(graph):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
