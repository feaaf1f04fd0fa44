"""Nodes by name: a node is called by its own name or by the name of its first output.

ONNX asks for neither names of nodes nor that they be unique; a name in a file must nevertheless mean one node.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from quarot_onnx.errors import ConfigError, did_you_mean
from quarot_onnx.graph.linear import LINEAR_OPS, Linear, linear_at
from quarot_onnx.graph.query import label


@dataclass(frozen=True)
class Ref:
    """A name and where in the file it stands.

    Attributes:
        place: The key path, such as ``R1_pairs[3].prev_nodes[0]``.
        name: The name.
    """

    place: str
    name: str


class Names:
    """The nodes of a graph by what a file may call them."""

    def __init__(self, graph: ir.Graph) -> None:
        self._by_name: defaultdict[str, list[ir.Node]] = defaultdict(list)
        self._by_output: dict[str, ir.Node] = {}
        for node in graph:
            if node.name:
                self._by_name[node.name].append(node)
            if node.outputs and node.outputs[0].name:
                self._by_output[node.outputs[0].name] = node

    def __contains__(self, name: str) -> bool:
        return name in self._by_name or name in self._by_output

    def __iter__(self) -> Iterator[str]:
        yield from self._by_name
        yield from self._by_output

    def find(self, ref: Ref, op_types: Collection[str] = ()) -> ir.Node:
        """The one node that is meant.

        Args:
            ref: The name.
            op_types: Operators that suit the place; only for the nearest match. Empty: any.

        Raises:
            ConfigError: No node, or more than one, has the name.
        """
        nodes = self._by_name.get(ref.name, [])
        if len(nodes) > 1:
            outputs = " or ".join(repr(node.outputs[0].name) for node in nodes[:2])
            raise ConfigError(
                f"{ref.place}: {len(nodes)} nodes are named {ref.name!r}; "
                f"call the one you mean by its first output, such as {outputs}"
            )
        node = nodes[0] if nodes else self._by_output.get(ref.name)
        if node is None:
            raise ConfigError(f"{ref.place}: the model has no node {ref.name!r}{self.near(ref.name, op_types)}")
        return node

    def near(self, name: str, op_types: Collection[str] = ()) -> str:
        """The clause that names the nearest node, first among those with a suitable operator."""
        nodes = {**self._by_output, **{name: nodes[0] for name, nodes in self._by_name.items()}}
        suitable = [known for known, node in nodes.items() if node.op_type in op_types]
        return did_you_mean(name, suitable) or did_you_mean(name, nodes)

    def linear(self, ref: Ref) -> Linear:
        """The Linear that is meant.

        Raises:
            ConfigError: No such node, or it is no Linear; says why.
        """
        node = self.find(ref, LINEAR_OPS)
        linear = linear_at(node)
        if linear is None:
            raise ConfigError(f"{ref.place}: node {ref.name!r} is no Linear: {_why_no_linear(node)}")
        return linear

    def reference(self, node: ir.Node) -> str:
        """The name by which :meth:`find` finds ``node`` again.

        Raises:
            ConfigError: It has none.
        """
        if node.name and self._by_name[node.name] == [node]:
            return node.name
        output = node.outputs[0].name
        if output and output not in self._by_name:
            return output
        raise ConfigError(
            f"node {label(node)!r} has no name of its own and neither has its first output; "
            "give every node a unique name before its places are written to a file"
        )


def _why_no_linear(node: ir.Node) -> str:
    if node.op_type not in LINEAR_OPS:
        return f"it is a {node.op_type}, not a MatMul or Gemm"
    return f"the second input of this {node.op_type} is not a constant float matrix [in, out]"


def once(refs: list[tuple[Ref, ir.Node]]) -> None:
    """Refuse a node that is named twice.

    Raises:
        ConfigError: Naming both places.
    """
    seen: dict[ir.Node, Ref] = {}
    for ref, node in refs:
        if node in seen:
            raise ConfigError(f"{ref.place}: node {ref.name!r} is already named at {seen[node].place}; name it once")
        seen[node] = ref
