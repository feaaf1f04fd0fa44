"""The head in panels of its columns, where it is larger than a piece: a weight of 32,000 columns and more.

A column of a product depends on no other one, and onnxruntime adds the terms of each in the same order however many
there are: panels put side by side are the product to the last digit. They are products like others, so that pieces end
between them.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from quarot_onnx.graph.edit import Editor
from quarot_onnx.graph.query import attribute_ints, data_input, label
from quarot_onnx.io.tensors import Array, lazy_tensor, read_rows
from quarot_onnx.piecewise.memory import weight_bytes

_STEP = 128
"""Panels have a multiple of so many columns: onnxruntime goes through fewer in another way."""

_ROWS = 256
"""Rows of a weight that are read at a time."""


@dataclass(frozen=True, eq=False)
class Head:
    """A product with a constant whose columns are put out as they are, but for their type.

    Attributes:
        product: The MatMul.
        casts: What turns its result into the output.
        tensor: The constant: ``[in, out]``, or where it is transposed ``[out, in]``.
        transposed: The node that transposes it; None for none.
    """

    product: ir.Node
    casts: tuple[ir.Node, ...]
    tensor: ir.TensorProtocol
    transposed: ir.Node | None

    @property
    def columns(self) -> int:
        """How many there are."""
        return int(self.tensor.shape.numpy()[0 if self.transposed is not None else 1])

    def panels(self, limit: int) -> list[range]:
        """Ranges of columns, of ``limit`` bytes to a step of columns, or one for all."""
        steps = self.columns // _STEP
        count = max(min(-(-weight_bytes(self.tensor) // limit), steps), 1)
        bounds = [*(_STEP * (steps * i // count) for i in range(count)), self.columns]
        return [range(*ends) for ends in pairwise(bounds)]


def heads(model: ir.Model, observed: Collection[str] = ()) -> list[Head]:
    """The heads of a model; one of which a value is looked at on the way to the output is none."""
    found = (_head(node, observed) for node in model.graph if node.op_type == "MatMul" and not node.domain)
    return [head for head in found if head is not None]


def light(model: ir.Model) -> set[ir.TensorProtocol]:
    """Weights of 16 bits that a piece takes as they are, or not whole: tables of rows, and heads."""
    found = {head.tensor for head in heads(model)}
    for value in model.graph.initializers.values():
        nodes = [use.node for use in value.uses()]
        if value.const_value is not None and nodes and all(node.op_type == "Gather" for node in nodes):
            found.add(value.const_value)
    return found


def _head(product: ir.Node, observed: Collection[str]) -> Head | None:
    value, turned = data_input(product, 1), None
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose" and attribute_ints(producer, "perm") in (None, (1, 0)):
        turned, value = producer, data_input(producer)
    tensor = value.const_value
    if tensor is None or value.is_graph_input() or len(tensor.shape) != 2:
        return None
    casts: list[ir.Node] = []
    made = product.outputs[0]
    while not made.is_graph_output():
        nodes = [use.node for use in made.uses()]
        if made.name in observed or len(nodes) != 1 or nodes[0].op_type != "Cast":
            return None
        casts.append(nodes[0])
        made = nodes[0].outputs[0]
    return None if made.name in observed or made.uses() else Head(product, tuple(casts), tensor, turned)


def in_panels(model: ir.Model, limit: int, observed: Collection[str] = ()) -> ir.Model:
    """A copy of a model with its heads in panels; the model itself where they fit into a piece.

    Args:
        model: The model; it is not changed.
        limit: Bytes of the weights of a piece.
        observed: Names of values that are looked at.
    """
    if not any(len(head.panels(limit)) > 1 for head in heads(model, observed)):
        return model
    copy = model.clone()
    for head in heads(copy, observed):
        if len(panels := head.panels(limit)) > 1:
            _put(head, panels, Editor(copy))
    return copy


def _put(head: Head, panels: list[range], editor: Editor) -> None:
    """Put panels in the place of a head."""
    graph, nodes = editor.graph, [head.product, *head.casts]
    output, parts = nodes[-1].outputs[0], list[ir.Value]()
    for columns in panels:
        made = _weight(head, columns, editor)
        for node in nodes:
            inputs = [data_input(head.product), made] if node is head.product else [made]
            part = editor.node(
                node.op_type, inputs, f"{label(node)}/{columns.start}", attributes=list(node.attributes.values())
            )
            graph.insert_before(head.product, part)
            made = part.outputs[0]
            _describe(made, node.outputs[0], len(columns))
        parts.append(made)
    joined = editor.node("Concat", parts, f"{label(head.product)}/columns", attributes=[ir.AttrInt64("axis", -1)])
    graph.insert_before(head.product, joined)
    editor.take_over(output, joined.outputs[0])
    graph.remove(nodes[::-1])


def _describe(value: ir.Value, like: ir.Value, columns: int) -> None:
    value.type = like.type
    if like.shape is not None:
        value.shape = ir.Shape([*like.shape[:-1], columns])


def _weight(head: Head, columns: range, editor: Editor) -> ir.Value:
    """Some columns of a head's weight."""
    tensor, turned = head.tensor, head.transposed
    rows, stem = int(tensor.shape.numpy()[0]), f"{tensor.name}/{columns.start}"
    if turned is None:
        shape, read = (rows, len(columns)), partial(_columns, tensor, rows, columns)
    else:
        shape = (len(columns), int(tensor.shape.numpy()[1]))
        read = partial(read_rows, tensor, columns.start, columns.stop)
    value = editor.initializer(stem, lazy_tensor(read, dtype=tensor.dtype, shape=shape, name=stem))
    if turned is None:
        return value
    node = editor.node("Transpose", [value], f"{stem}/transposed", attributes=list(turned.attributes.values()))
    editor.graph.insert_before(head.product, node)
    return node.outputs[0]


def _columns(tensor: ir.TensorProtocol, rows: int, columns: range) -> Array:
    part = slice(columns.start, columns.stop)
    return np.concatenate([read_rows(tensor, row, row + _ROWS)[:, part] for row in range(0, rows, _ROWS)])
