"""Which axes a product pairs, and what follows that of Q and K.

A product is a MatMul, or a FusedMatMul with the Transposes that onnxruntime's optimiser puts inside. FusedMatMul
(com.microsoft) computes alpha · A' B', where A' is A with, in this order of perm for rank 4::

    trans  transBatch   perm
      0        0        0 1 2 3
      1        0        0 1 3 2
      0        1        1 2 0 3
      1        1        1 2 3 0
"""

import onnx_ir as ir

from quarot_onnx.graph.query import attribute_int, data_input
from quarot_onnx.graph.shapes import Shapes

SCORE_PATH = frozenset({"Add", "Sub", "Mul", "Div", "Where", "Tanh", "Max", "Min", "Clip", "Concat"})
"""What may stand between Q Kᵀ and its Softmax; a Concat puts the score of a sink beside the others (gpt-oss)."""


def operand_axis(product: ir.Node, index: int, axis: int, shapes: Shapes) -> int | None:
    """Where one of the last two axes of an operand, as the product takes it, lies in what the node reads.

    Args:
        product: A MatMul or FusedMatMul.
        index: The operand, 0 or 1.
        axis: -1 or -2.
        shapes: Inferred shapes.

    Returns:
        The axis, counted from the end; None where it is the first one and the rank is not known.
    """
    side = "AB"[index]
    turned = bool(attribute_int(product, f"trans{side}", 0))
    if not attribute_int(product, f"transBatch{side}", 0):
        return -3 - axis if turned else axis
    if (axis == -1) is not turned:
        return -1
    rank = shapes.rank(data_input(product, index))
    return None if rank is None else -rank
