"""Edits on an ``ir.Graph`` that know nothing of rotation or quantization.

Uses are snapshotted before a node is inserted on a value; what an edit orphans is removed.
"""

from collections.abc import Callable, Sequence

import onnx_ir as ir

from quarot_onnx.graph.query import consumers
from quarot_onnx.io.names import Names


class Editor:
    """Edits one graph and keeps the names in it unique."""

    def __init__(self, model: ir.Model) -> None:
        """Take stock of the names in use."""
        self.model = model
        self.graph = model.graph
        self._names = Names(model)

    def unique(self, stem: str) -> str:
        """A name that nothing in the graph has: ``stem`` itself, or with a number."""
        return self._names.unique(stem)

    def initializer(self, stem: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Register a tensor under a unique name; the tensor is renamed with it."""
        name = self.unique(stem)
        tensor.name = name
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        stem: str,
        *,
        domain: str = "",
        outputs: int = 1,
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Node:
        """Make a node with unique names, and import its domain; the caller inserts it."""
        name = self.unique(stem)
        if domain:
            self.graph.opset_imports.setdefault(domain, 1)
        made = ir.Node(domain, op_type, inputs, attributes, num_outputs=outputs, name=name)
        for i, out in enumerate(made.outputs):
            out.name = self.unique(f"{name}_output_{i}")
        return made

    def before(self, anchor: ir.Node, nodes: Sequence[ir.Node]) -> None:
        """Insert nodes before ``anchor``."""
        self.graph.insert_before(anchor, nodes)

    def after(self, anchor: ir.Node, nodes: Sequence[ir.Node]) -> None:
        """Insert nodes after ``anchor``."""
        self.graph.insert_after(anchor, nodes)

    def after_value(self, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
        """Insert nodes where ``value`` has just come to be: before any node that can use it."""
        producer = value.producer()
        if producer is not None:
            self.after(producer, nodes)
        else:
            self.before(self.graph[0], nodes)

    def set_int(self, node: ir.Node, name: str, value: int) -> None:
        """Set an int attribute."""
        node.attributes[name] = ir.AttrInt64(name, value)

    def replace_input(self, node: ir.Node, index: int, value: ir.Value) -> None:
        """Give ``node`` another operand and remove what this orphans."""
        old = node.inputs[index]
        node.replace_input_with(index, value)
        if old is not None:
            self.prune(old)

    def redirect(self, value: ir.Value, build: Callable[[ir.Value], Sequence[ir.Node]]) -> None:
        """Send all users of ``value`` to the last output of the nodes that ``build`` makes of it.

        A graph output keeps its name: the new value takes it over.

        Args:
            value: The value; graph input or output of a node.
            build: Makes the nodes, in order, the first of which reads ``value``.
        """
        users = consumers(value)
        nodes = list(build(value))
        self.after_value(value, nodes)
        result = nodes[-1].outputs[0]
        for node, index in users:
            node.replace_input_with(index, result)
        self.take_over(value, result)

    def replace_node(self, node: ir.Node, nodes: Sequence[ir.Node]) -> None:
        """Put ``nodes`` in the place of a node with one output; the last one's output takes its users over."""
        old, new = node.outputs[0], nodes[-1].outputs[0]
        users = consumers(old)
        self.before(node, nodes)
        for user, index in users:
            user.replace_input_with(index, new)
        self.take_over(old, new)
        operands = [v for v in node.inputs if v is not None]
        self.graph.remove(node, safe=True)
        for operand in operands:
            self.prune(operand)

    def take_over(self, old: ir.Value, new: ir.Value) -> None:
        """Make ``new`` the graph output that ``old`` is, name, type and shape, however often it is listed."""
        positions = [position for position, output in enumerate(self.graph.outputs) if output is old]
        if not positions:
            return
        name = old.name
        old.name = self.unique(f"{name}_before")
        new.name, new.type, new.shape = name, old.type, old.shape
        for position in positions:
            self.graph.outputs[position] = new

    def prune(self, value: ir.Value) -> None:
        """Remove an initializer or a chain of nodes that nobody uses any more."""
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            return
        if value.is_initializer() and value.name is not None:
            del self.graph.initializers[value.name]
            return
        node = value.producer()
        if node is None or any(out.uses() or out.is_graph_output() for out in node.outputs):
            return
        operands = [v for v in node.inputs if v is not None]
        self.graph.remove(node, safe=True)
        for operand in operands:
            self.prune(operand)
