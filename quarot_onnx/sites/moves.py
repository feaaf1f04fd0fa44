"""What may happen to a vector along the last axis without a rotation of it being noticed.

For y = x R with R orthogonal: a factor that is one for the whole vector commutes with R, and so does any
change of layout that leaves the last axis whole and last.
"""

import onnx_ir as ir

from quarot_onnx.graph.query import attribute_int, attribute_ints, data_input, resolve_constant, scalar, small_ints
from quarot_onnx.graph.shapes import Shapes

MOVES = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Slice", "Gather", "GatherND", "Expand", "Flatten", "Transpose"})


def scaled_operand(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """The operand of a Mul or Div whose other operand is one number for each vector, constant or computed.

    Args:
        node: Any node.
        shapes: Inferred shapes.

    Returns:
        The vector's value, or None when the node is no such product or quotient.
    """
    if node.op_type not in ("Mul", "Div"):
        return None
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        vector, factor = data_input(node, index), data_input(node, 1 - index)
        if scalar(factor) is not None or (shapes.is_one_per_row(factor) and not shapes.is_one_per_row(vector)):
            return vector
    return None


def channels_scaled(node: ir.Node) -> ir.Value | None:
    """The operand of a Mul whose other operand is a constant vector, one number for each channel (LayerScale)."""
    for index in (0, 1) if node.op_type == "Mul" else ():
        factor = resolve_constant(data_input(node, 1 - index))
        if factor is not None and len([length for length in factor.shape if length != 1]) == 1:
            return data_input(node, index)
    return None


def moved_operand(node: ir.Node, width: int, shapes: Shapes) -> ir.Value | None:
    """The operand whose vectors of length ``width`` a change of layout leaves whole.

    Args:
        node: Any node.
        width: Length of the last axis.
        shapes: Inferred shapes.

    Returns:
        The operand, or None when the node is no change of layout or may mix vectors.
    """
    if node.op_type not in MOVES:
        return None
    return data_input(node) if _keeps_last_axis(node, width, shapes) else None


def _keeps_last_axis(node: ir.Node, width: int, shapes: Shapes) -> bool:
    value = data_input(node)
    rank = shapes.rank(value)
    if node.op_type == "Transpose":
        perm = attribute_ints(node, "perm")
        return perm is not None and perm[-1] == len(perm) - 1
    if node.op_type == "Slice" and len(node.inputs) > 3:
        axes = small_ints(node.inputs[3])
        return axes is not None and not any(_may_be_last(axis, rank) for axis in axes)
    if node.op_type == "Gather" and _may_be_last(attribute_int(node, "axis", 0), rank):
        return False
    if node.op_type == "Reshape":
        target = small_ints(node.inputs[1])
        if target and target[-1] == width:
            return True
    return shapes.last(value) == width and shapes.last(node.outputs[0]) == width


def _may_be_last(axis: int, rank: int | None) -> bool:
    """Whether an axis is the last one, or could be where the rank is not known."""
    return axis == -1 or (axis > 0 and rank is None) or (rank is not None and axis == rank - 1)
