"""Which values hold rows that were chosen by what the model computes: those of a mixture of experts.

A router, which is a product with a weight, says which expert a token goes to (TopK, ArgMax, NonZero), and each expert
gets the rows of its tokens (Gather). How many they are, and which, depends on the weights: a model whose weights were
rounded may choose others.
"""

import onnx_ir as ir

from quarot_onnx.graph.query import SIZE_ONLY, operands

_PRODUCTS = frozenset({"MatMul", "Gemm", "MatMulNBits", "MatMulInteger", "Einsum"})
_CHOICES = {"NonZero": 0, "ArgMax": 0, "TopK": 1}
"""Operators that give numbers of places, and which of their outputs holds them."""

_TAKES_ROWS = frozenset({"Gather", "GatherND"})
_ON_NUMBERS = frozenset(
    {
        "Add",
        "Cast",
        "Concat",
        "Div",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Mod",
        "Mul",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Sub",
        "Transpose",
        "Unsqueeze",
    }
)
"""What may lie between a choice and the rows that are taken by it."""


def routed_values(graph: ir.Graph | ir.Function) -> frozenset[ir.Value]:
    """The values whose rows the model chooses itself, up to where they are put back into their places (Scatter).

    Args:
        graph: A graph in topological order.
    """
    computed, chosen, routed = set[ir.Value](), set[ir.Value](), set[ir.Value]()
    for node in graph:
        if node.op_type in SIZE_ONLY:
            continue
        read, outputs = list(operands(node)), set(node.outputs)
        takes_rows = node.op_type in _TAKES_ROWS and node.inputs[1] in chosen and node.inputs[0] not in chosen
        put_back = node.op_type.startswith("Scatter")
        if takes_rows or routed.intersection(read[:1] if put_back else read):
            routed |= outputs
        elif node.op_type in _CHOICES and computed.intersection(read):
            chosen.add(node.outputs[_CHOICES[node.op_type]])
        elif node.op_type in _ON_NUMBERS and chosen.intersection(read):
            chosen |= outputs
        if node.op_type in _PRODUCTS or computed.intersection(read):
            computed |= outputs
    return frozenset(routed)
