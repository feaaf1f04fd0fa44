"""Positions, shifted by the prefix: where they come in as an input, or where the graph counts them itself.

A fused attention that applies RoPE inside counts its past, so there is nothing to do for it.
"""

from collections.abc import Iterator

import onnx_ir as ir

from quarot_onnx.calibration.inputs import FLOATS, INTEGERS, InputRole
from quarot_onnx.errors import ModelError
from quarot_onnx.graph.parts import nodes_behind
from quarot_onnx.graph.query import (
    SIZE_ONLY,
    attribute_int,
    consumers,
    data_input,
    label,
    operands,
    resolve_constant,
    scalar,
)
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.prefix.graft import Graft, has

_COUNTING = frozenset({"GroupQueryAttention"})
_POSITIONS = {("com.microsoft", "RotaryEmbedding"): 1, ("", "RotaryEmbedding"): 3}
"""RoPE as an operator, and which of its inputs holds positions."""


def find_positions(graph: ir.Graph, roles: dict[str, InputRole], shapes: Shapes) -> tuple[tuple[ir.Node, int], ...]:
    """The inputs of nodes, as (node, index), that are to be increased by the length of the prefix.

    Raises:
        ModelError: None is found, though an attention does not count its past by itself.
    """
    given = [value for value in graph.inputs if roles.get(value.name or "") is InputRole.POSITIONS]
    if given:
        # What a GroupQueryAttention is told is lengthened together with what it is fed.
        return tuple(use for value in given for use in consumers(value) if use[0].op_type not in _COUNTING | SIZE_ONLY)
    found = dict.fromkeys(use for node in graph for use in _counted(node, shapes))
    counting = any(node.op_type in _COUNTING and attribute_int(node, "do_rotary", 0) for node in graph)
    if not found and not counting:
        raise ModelError(
            "the positions cannot be shifted: they are no input of the graph, and no RoPE reads integers that it counts"
        )
    return tuple(found)


def shift_positions(
    graft: Graft, places: tuple[tuple[ir.Node, int], ...], shapes: Shapes, mask: ir.Value | None = None
) -> None:
    """Increase them, without what a mask [batch, columns] hides at the left of each row, where one is given."""
    for node, index in places:
        value = data_input(node, index)
        dtype = shapes.dtype(value) or ir.DataType.INT64
        pads = None if mask is None else graft.pads(mask, shapes.rank(value) or 0, dtype)
        node.replace_input_with(index, graft.added(value, dtype, pads))


def _counted(node: ir.Node, shapes: Shapes) -> Iterator[tuple[ir.Node, int]]:
    """Where positions that the graph has counted become angles."""
    index = _POSITIONS.get((node.domain, node.op_type))
    if index is not None and has(node, index):
        yield node, index
    elif node.op_type in ("Cos", "Sin"):
        yield from _counts_behind(node, shapes)


def _counts_behind(end: ir.Node, shapes: Shapes) -> Iterator[tuple[ir.Node, int]]:
    """The Casts from integers to floats, that are no constants, behind an angle, and what reads a Range of floats.

    Raises:
        ModelError: A length takes part in another way than as the bound of a Range, or a Range counts in other steps.
    """
    queue, seen = [(end, 0)], {data_input(end)}
    while queue:
        user, index = queue.pop()
        node = data_input(user, index).producer()
        if node is None:
            continue
        if node.op_type == "Cast" and shapes.dtype(data_input(node)) in INTEGERS:
            if resolve_constant(data_input(node)) is None:
                _check_no_length(node, shapes)
                yield node, 0
            continue
        if node.op_type == "Range":
            if any(value.is_graph_input() for made in nodes_behind(node.outputs) for value in operands(made)):
                _check_steps(node)
                yield user, index
            continue
        for place, operand in enumerate(node.inputs):
            if operand is not None and operand not in seen and shapes.dtype(operand) in FLOATS:
                seen.add(operand)
                queue.append((node, place))


def _check_no_length(cast: ir.Node, shapes: Shapes) -> None:
    if shapes.is_single(data_input(cast)):
        raise ModelError(
            f"the positions cannot be shifted: angles are computed with a single number that {label(cast)} casts, "
            "which may be a length or a position"
        )


def _check_steps(node: ir.Node) -> None:
    if scalar(node.inputs[2]) != 1:
        raise ModelError(f"the positions cannot be shifted: {label(node)} does not count them by ones")
