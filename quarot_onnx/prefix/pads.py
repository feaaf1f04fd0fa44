"""Rows padded on the left, in graphs that count positions along the columns, whatever the mask hides.

RoPE is relative, so pads before a text are harmless, until a prefix stands before them: the text's distance to it would
depend on the pads. They are taken off, so that every row's text begins at position p::

    position' = max(position − pads, 0) + p         pads[row] = index of the first 1 in the row of the mask

Positions [1, ..., sequence] become [batch, ..., sequence] by this. That is done where all that is computed from them
keeps rows on the first axis, up to RoPE on [batch, heads, sequence, head_dim]; elsewhere it is left, and told.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.inputs import INTEGERS, InputRole
from quarot_onnx.graph.parts import nodes_behind
from quarot_onnx.graph.query import attribute_int, attribute_ints, consumers, data_input, operands, small_ints
from quarot_onnx.graph.shapes import Shapes

_UNARY = frozenset({"Cast", "Cos", "Identity", "Neg", "Sin"})
_BINARY = frozenset({"Add", "Div", "Mul", "Sub"})
_HEADS_RANK = 4
_LEAST_OPSET = 13


@dataclass(frozen=True, eq=False)
class Pads:
    """What becomes of pads on the left.

    Attributes:
        counted: Positions go on over pads in the graph as it is.
        mask: The mask [batch, columns] that they can be read off and taken off by; None: they stay.
        rows: Values that have one row for all rows of the batch, and one for each when pads are taken off.
    """

    counted: bool = False
    mask: ir.Value | None = None
    rows: tuple[ir.Value, ...] = ()


def find_pads(graph: ir.Graph, positions: Sequence[tuple[ir.Node, int]], inputs: ModelInputs, shapes: Shapes) -> Pads:
    """Whether positions count pads, and whether these can be taken off.

    Args:
        graph: The graph.
        positions: Where positions are read, as `find_positions` gives them.
        inputs: What the graph is fed.
        shapes: Inferred shapes.
    """
    masks = [value for value in graph.inputs if inputs.roles.get(value.name or "") in (InputRole.MASK, InputRole.BIAS)]
    if InputRole.POSITIONS in inputs.roles.values() or not masks or not positions:
        return Pads()
    made = nodes_behind((data_input(node, index) for node, index in positions), through_sizes=False)
    if any(value in masks for node in made for value in operands(node)):
        return Pads()
    rows = _rows(graph, dict(positions), shapes)
    if rows is None or len(masks) > 1 or not _shows_pads(masks[0], graph, inputs):
        return Pads(counted=True)
    return Pads(counted=True, mask=masks[0], rows=rows)


def _shows_pads(mask: ir.Value, graph: ir.Graph, inputs: ModelInputs) -> bool:
    """Whether a mask has ones for text, and columns for all of it, those in the cache among them."""
    if mask.dtype not in INTEGERS | {ir.DataType.BOOL} or mask.shape is None or len(mask.shape) != 2:
        return False
    tokens = next(value for value in graph.inputs if value.name == inputs.tokens)
    new_alone = tokens.shape is not None and mask.shape[1] == tokens.shape[1]
    return (graph.opset_imports.get("") or 0) >= _LEAST_OPSET and not (new_alone and inputs.has_cache)


def _rows(graph: ir.Graph, positions: dict[ir.Node, int], shapes: Shapes) -> tuple[ir.Value, ...] | None:
    """All that is computed from positions with one row, up to RoPE; None where its first axis may be no row's."""
    found: set[ir.Value] = set()
    for node in graph:
        fed = [index for index, value in enumerate(node.inputs) if value in found]
        if not fed and node in positions:
            shape = shapes.of(data_input(node, positions[node]))
            if node.op_type == "RotaryEmbedding":
                if shape is None or len(shape) != 2:
                    return None
                continue
            if shape is None or len(shape) < 2 or shape[0] != 1:
                return None
            fed = [positions[node]]
        if not fed or _is_rope(node, fed, found, shapes):
            continue
        if not _keeps_rows(node, fed, shapes):
            return None
        found.update(node.outputs)
    outside = any(user.graph is not graph for value in found for user, _ in consumers(value))
    return None if outside or not found.isdisjoint(graph.outputs) else tuple(found)


def _is_rope(node: ir.Node, fed: list[int], found: set[ir.Value], shapes: Shapes) -> bool:
    """Whether angles' cosines and sines meet Q or K here: [batch, heads, sequence, head_dim]."""
    if (node.domain, node.op_type) == ("", "RotaryEmbedding"):
        return fed == [1, 2]
    if node.op_type != "Mul":
        return False
    others = [value for value in node.inputs if value is not None and value not in found and value.const_value is None]
    ranks = {shapes.rank(value) for value in node.inputs if value is not None}
    return bool(others) and ranks == {_HEADS_RANK}


def _keeps_rows(node: ir.Node, fed: list[int], shapes: Shapes) -> bool:
    """Whether the first axis of what a node makes is that of the inputs ``fed``, and nothing else has to be as long."""
    rank = shapes.rank(data_input(node, fed[0]))
    if rank is None or node.domain:
        return False
    if node.op_type in _UNARY:
        return True
    if node.op_type in _BINARY or (node.op_type == "MatMul" and rank > 2):
        own = all(shapes.rank(data_input(node, index)) == rank for index in fed)
        others = [shapes.of(value) for i, value in enumerate(node.inputs) if i not in fed and value is not None]
        return own and all(_broadcasts(other, rank, product=node.op_type == "MatMul") for other in others)
    if node.op_type == "Concat":
        return fed == list(range(len(node.inputs))) and attribute_int(node, "axis", 0) % rank != 0
    return fed == [0] and _moves_others(node, rank, shapes)


def _moves_others(node: ir.Node, rank: int, shapes: Shapes) -> bool:
    """Whether a node surely works on other axes than the first."""
    match node.op_type:
        case "Transpose":
            return (attribute_ints(node, "perm") or (1,))[0] == 0
        case "Split":
            return attribute_int(node, "axis", 0) % rank != 0
        case "Unsqueeze" | "Squeeze" | "Slice":
            place = 3 if node.op_type == "Slice" else 1
            axes = small_ints(node.inputs[place]) if len(node.inputs) > place else None
            made = shapes.rank(node.outputs[0]) if node.op_type == "Unsqueeze" else rank
            return bool(axes and made) and all(axis % (made or 1) for axis in axes or ())
    return False


def _broadcasts(shape: tuple[int | None, ...] | None, rank: int, *, product: bool) -> bool:
    """Whether an operand leaves the first axis of another of so many axes as it is."""
    if shape is None or len(shape) > rank:
        return False
    # Frequencies that a product multiplies are often expanded along the rows of the positions.
    return len(shape) < rank or shape[0] == 1 or (product and shape[0] is None)
