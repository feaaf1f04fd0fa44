"""Questions about an ``ir.Graph``: producers, consumers, constants. Nothing here changes a graph.

"Resolving" a value means to look through the operators that exporters put between a tensor and its user
without changing what it holds: ``Identity`` (TorchScript merges equal initializers through it), ``Cast``
and, for matrices, ``Transpose``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.io import model_io
from quarot_onnx.io.nodes import all_nodes, subgraphs

PASS_THROUGH = frozenset({"Identity", "Cast", "CastLike", "Dropout"})
"""Operators whose output 0 is their input 0, up to rounding."""

_CASTS = frozenset({"Cast", "CastLike"})

SIZE_ONLY = frozenset({"Shape", "Size"})
"""Operators that look at a value's shape and not at what it holds."""

FLOAT_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant tensor and how its user sees it.

    Attributes:
        value: The initializer (or the output of a Constant node).
        tensor: What it holds.
        transposed: The user sees the transpose of what is stored.
        dtype: The type that the user sees, after Casts.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    transposed: bool
    dtype: ir.DataType

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the user sees."""
        stored = tuple(int(d) for d in self.tensor.shape.numpy())
        return stored[::-1] if self.transposed else stored


def attribute_ints(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """A list-of-ints attribute, or None when it is absent."""
    attr = node.attributes.get(name)
    return None if attr is None else tuple(attr.as_ints())


def attribute_int(node: ir.Node, name: str, default: int) -> int:
    """An int attribute with its default."""
    attr = node.attributes.get(name)
    return default if attr is None else int(attr.as_int())


def attribute_float(node: ir.Node, name: str, default: float) -> float:
    """A float attribute with its default."""
    attr = node.attributes.get(name)
    return default if attr is None else float(attr.as_float())


def operands(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, in subgraphs too, where it comes from outside of them."""
    yield from (value for value in node.inputs if value is not None)
    for graph in subgraphs(node):
        for inner in all_nodes(graph):
            yield from (v for v in inner.inputs if v is not None and v.graph is node.graph)


def label(node: ir.Node) -> str:
    """A node as messages name it: its name, or its operator and first output when it has none."""
    return node.name or f"{node.op_type}->{node.outputs[0].name}"


def data_input(node: ir.Node, index: int = 0) -> ir.Value:
    """Input ``index`` of a node that the operator's definition guarantees to exist."""
    value = node.inputs[index]
    assert value is not None, label(node)
    return value


def passes(node: ir.Node) -> bool:
    """Whether a node is one of ``PASS_THROUGH`` and its output holds what its input 0 does, up to rounding of floats.

    Casts of integers to integers are among them, which exporters put behind shapes and indices.
    """
    if node.domain or node.op_type not in PASS_THROUGH or node.inputs[0] is None:
        return False
    if node.op_type not in _CASTS:
        return True
    target = _cast_to(node)
    if target is None or target in FLOAT_TYPES:
        return True
    source = node.inputs[0].dtype or _cast_to(node.inputs[0].producer())
    return target.is_integer() and source is not None and source.is_integer()


def _cast_to(node: ir.Node | None) -> ir.DataType | None:
    """The type that a Cast or CastLike makes, where it is known; None for other nodes."""
    if node is None or node.op_type not in _CASTS:
        return None
    return ir.DataType(attribute_int(node, "to", 0)) if node.op_type == "Cast" else node.outputs[0].dtype


def _tensor_of(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node's output, or None."""
    if value.const_value is not None:
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant":
        return None
    for name, attr in node.attributes.items():
        if name == "value":
            return attr.as_tensor()
        if name in ("value_int", "value_float", "value_ints", "value_floats"):
            return ir.tensor(attr.value)
    return None


def resolve_constant(value: ir.Value | None) -> Constant | None:
    """The constant behind ``value``, looking through Identity, Cast and 2-D Transpose.

    Returns:
        The constant, or None when ``value`` depends on an input of the graph.
    """
    transposed = False
    dtype: ir.DataType | None = None
    while value is not None:
        tensor = _tensor_of(value)
        if tensor is not None:
            return Constant(value, tensor, transposed, dtype or tensor.dtype)
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Transpose":
            if attribute_ints(node, "perm") not in (None, (1, 0)):
                return None
            transposed = not transposed
        elif not passes(node):
            return None
        elif node.op_type in _CASTS:
            dtype = dtype or _cast_to(node)
            if dtype is None:
                return None  # the type is that of another value
        value = node.inputs[0]
    return None


def seen(constant: Constant, factor: float = 1.0, *, own: bool = True) -> NDArray[np.floating]:
    """A constant as its user sees it, times ``factor``: a matrix as [in, out], in the type that the user sees.

    Args:
        constant: The constant.
        factor: What it is multiplied by.
        own: False where nothing is written into the array.
    """
    stored = model_io.read_array(constant.tensor, own=own)
    array = (stored.T if constant.transposed else stored).astype(constant.dtype.numpy(), copy=False)
    return array if factor == 1.0 else array * np.float32(factor)


def scalar(value: ir.Value | None) -> float | None:
    """The number that a one-element constant holds, or None."""
    constant = resolve_constant(value)
    if constant is None or constant.tensor.size != 1:
        return None
    return float(constant.tensor.numpy().reshape(-1)[0])


def small_ints(value: ir.Value | None) -> tuple[int, ...] | None:
    """The integers of a small constant (an axes, a starts, a perm input), or None."""
    constant = resolve_constant(value)
    if constant is None or constant.tensor.size > 64:
        return None
    array = np.asarray(constant.tensor.numpy())
    return tuple(int(i) for i in array.reshape(-1)) if np.issubdtype(array.dtype, np.integer) else None


def through(value: ir.Value) -> ir.Value:
    """``value`` before any pass-through operators that produced it."""
    node = value.producer()
    while node is not None and passes(node):
        value = data_input(node)
        node = value.producer()
    return value


def consumers(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """A snapshot of the uses of ``value``, in graph order where nodes have one, as (node, input index)."""
    return [(use.node, use.idx) for use in value.uses()]


def consumers_through(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The uses of ``value``, with those by pass-through operators replaced by these operators' own uses."""
    for node, index in consumers(value):
        if index == 0 and passes(node):
            yield from consumers_through(node.outputs[0])
        else:
            yield node, index


def data_users(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """The uses of what ``value`` holds, through pass-through operators; those of its shape alone do not count."""
    return [(node, index) for node, index in consumers_through(value) if node.op_type not in SIZE_ONLY]


def first_reader(value: ir.Value) -> str:
    """The first node that reads what ``value`` holds, as messages name it; where there is none, the value."""
    return next((label(node) for node, _ in data_users(value)), value.name or "")
