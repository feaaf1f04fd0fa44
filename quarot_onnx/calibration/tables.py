"""The constant tables that a graph looks positions up in: cosines and sines of RoPE, and learned positions.

A fused operator for RoPE has its tables among its inputs. Spelt out, a Gather takes rows by position ids, or by what
the graph counts in their place (a Range, the sum of a mask), to which a number may be added, as OPT does; or a Slice
takes the first rows up to a length that is computed.
"""

import onnx_ir as ir

from quarot_onnx.calibration.inputs import INTEGERS, LAYOUT, InputRole, TensorSpec, logits_output
from quarot_onnx.calibration.roles import assign_roles
from quarot_onnx.errors import ModelError
from quarot_onnx.graph.query import FLOAT_TYPES, Constant, attribute_int, label, resolve_constant, scalar, small_ints
from quarot_onnx.graph.tags import PREFIX
from quarot_onnx.io.tensors import read_array

_ROPE = frozenset({"GroupQueryAttention", "RotaryEmbedding"})
_CARRIERS = LAYOUT | {"Slice", "Split", "Gather"}
"""What hands integers on, some of them or all."""

_SUMS = frozenset({"Add", "Sub", "Mul", "Max"})
"""What makes positions of positions and of numbers, lengths or a mask: one of the operands counts."""

_WITH_AXES = 4
"""Inputs of a Slice that says along which axes."""

_MOST = 1 << 20
"""Entries of a constant that is looked at."""

_STORED = frozenset({"Cast", "Identity", "DequantizeLinear", "Squeeze", "Unsqueeze", "Slice"})
"""How a table may be stored otherwise than it is looked up in."""


def position_table(graph: ir.Graph) -> tuple[int, str] | None:
    """How many positions the shortest table has rows for, and what it is; None without any.

    Args:
        graph: The graph.
    """
    counting = _Counting(_given(graph))
    found = (rows for node in graph for rows in (_of_rope(node), _gathered(node, counting), _sliced(node)))
    return min((rows for rows in found if rows is not None and rows[0] > 0), key=lambda rows: rows[0], default=None)


def _given(graph: ir.Graph) -> frozenset[ir.Value]:
    """The inputs that hold positions."""
    values = [value for value in graph.inputs if value.name not in graph.initializers]
    specs = [TensorSpec.of(value) for value in values]
    try:
        width = logits_output([TensorSpec.of(value) for value in graph.outputs]).width
        roles = assign_roles(specs, width, graph)
    except ModelError:  # no language model
        return frozenset()
    return frozenset(value for value in values if roles.get(value.name or "") is InputRole.POSITIONS)


def _of_rope(node: ir.Node) -> tuple[int, str] | None:
    if node.op_type not in _ROPE:
        return None
    tables = (resolve_constant(value) for value in node.inputs[1:])
    rows = [t.shape[0] for t in tables if t is not None and len(t.shape) == 2 and t.dtype in FLOAT_TYPES]
    return (min(rows), "rows of its tables for RoPE") if rows else None


def _gathered(node: ir.Node, counting: "_Counting") -> tuple[int, str] | None:
    """Of a Gather whose indices are positions."""
    packed = (node.domain, node.op_type) == ("com.microsoft", "GatherBlockQuantized")
    if (node.domain, node.op_type) != ("", "Gather") and not packed:
        return None
    table, index = _stored(node.inputs[0], numbers=packed), node.inputs[1]
    rows = None if table is None else _rows(table, attribute_int(node, "gather_axis" if packed else "axis", 0))
    added = None if rows is None or index is None else counting.added(index)
    return None if rows is None or added is None else (rows - added, f"rows of the table that {label(node)} looks up")


def _sliced(node: ir.Node) -> tuple[int, str] | None:
    """Of a Slice that takes the first rows of a table of floats, as many as there are tokens."""
    if (node.domain, node.op_type) != ("", "Slice") or len(node.inputs) < _WITH_AXES:
        return None
    table, axes = resolve_constant(node.inputs[0]), small_ints(node.inputs[3])
    if table is None or table.dtype not in FLOAT_TYPES or axes is None or len(axes) != 1:
        return None
    if resolve_constant(node.inputs[2]) is not None or axes[0] in {-1, len(table.shape) - 1}:
        return None
    return table.shape[axes[0]], f"rows of the table that {label(node)} cuts"


def _rows(shape: tuple[int, ...], axis: int) -> int | None:
    """The rows of a table [rows, width], whatever axes of one stand around them."""
    if len(shape) == 2:
        return shape[axis]
    long = [length for length in shape if length != 1]
    return long[0] if len(long) == 2 and axis in (0, shape.index(long[0])) else None


def _stored(value: ir.Value | None, *, numbers: bool) -> tuple[int, ...] | None:
    """The shape of the constant that a table is made of; None where there is none, or none of numbers.

    Args:
        value: The table.
        numbers: Integers in it stand for numbers.
    """
    while value is not None:
        constant = resolve_constant(value)
        if constant is not None:
            return constant.shape if numbers or constant.dtype in FLOAT_TYPES else None
        node = value.producer()
        if node is None or node.op_type not in _STORED:
            return None
        numbers |= node.op_type == "DequantizeLinear"
        value = node.inputs[0]
    return None


class _Counting:
    """Which values are positions, and what they have on top of them."""

    def __init__(self, given: frozenset[ir.Value]) -> None:
        """Nothing is known yet but the inputs that hold positions."""
        self._known: dict[ir.Value, int | None] = dict.fromkeys(given, 0)

    def added(self, value: ir.Value | None) -> int | None:
        """What an index has on top of the position that it stands for; None where it stands for none."""
        if value is None:
            return None
        if value not in self._known:
            node = None if resolve_constant(value) is not None else value.producer()
            self._known[value] = None if node is None or node.domain or not node.inputs else self._made_by(node)
        return self._known[value]

    def _made_by(self, node: ir.Node) -> int | None:
        if node.op_type in _CARRIERS and resolve_constant(node.inputs[0]) is None:
            return self.added(node.inputs[0])
        if node.op_type == "Where":
            return self._chosen(node)
        return self._summed(node) if node.op_type in _SUMS else _counted(node)

    def _chosen(self, node: ir.Node) -> int | None:
        """Of a choice, all of which must count, or be constant."""
        parts = [self.added(value) for value in node.inputs[1:] if resolve_constant(value) is None]
        counted = [part for part in parts if part is not None]
        return max(counted) if counted and len(counted) == len(parts) else None

    def _summed(self, node: ir.Node) -> int | None:
        """Of what is made of positions and something else: differences of two positions are none."""
        parts = [self.added(value) for value in node.inputs]
        counted = [part for part in parts if part is not None]
        if not counted or (node.op_type == "Sub" and (parts[0] is None or len(counted) > 1)):
            return None
        number = next((n for n in map(scalar, node.inputs) if n is not None), None)
        if node.op_type == "Mul":
            return max(counted) if number in (None, 1) else None  # by a mask
        if node.op_type == "Max" or label(node).startswith(PREFIX):
            return max(counted)  # a prefix's positions are positions
        return max(counted) + int((-1 if node.op_type == "Sub" else 1) * (number or 0))


def _counted(node: ir.Node) -> int | None:
    """Of what the graph counts: up to a length that is computed."""
    if node.op_type == "CumSum":
        return 1  # the first token is counted with itself
    if node.op_type == "Range" and resolve_constant(node.inputs[1]) is None:
        return int(scalar(node.inputs[0]) or 0)
    if node.op_type != "Slice" or len(node.inputs) <= 2 or resolve_constant(node.inputs[2]) is not None:
        return None
    return _first_of_row(resolve_constant(node.inputs[0]))


def _first_of_row(constant: Constant | None) -> int | None:
    """The first of the integers of a constant that go up by one; None of others."""
    if constant is None or constant.tensor.dtype not in INTEGERS or not 1 < constant.tensor.size <= _MOST:
        return None
    numbers = read_array(constant.tensor, own=False).reshape(-1)
    return int(numbers[0]) if (numbers[1:] - numbers[:-1] == 1).all() else None
