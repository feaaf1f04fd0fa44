"""Single numbers that a graph computes of lengths: 1 / sqrt(head_dim) where an exporter did not fold it."""

import onnx_ir as ir

from quarot_onnx.graph.query import PASS_THROUGH, attribute_int, resolve_constant, small_ints

_ARITHMETIC = frozenset({"Add", "Div", "Mul", "Neg", "Pow", "Reciprocal", "Sqrt", "Sub"})

_KEPT = PASS_THROUGH | {"Squeeze", "Unsqueeze"}

_MOST = 32
"""Nodes that such a number takes; exporters write some ten."""


def is_one_of_lengths(value: ir.Value) -> bool:
    """Whether a value is one number, made of constants and lengths of axes alone, whatever the graph is fed."""
    queue = [value]
    for _ in range(_MOST):
        if not queue:
            return True
        current = queue.pop()
        constant = resolve_constant(current)
        if constant is not None:
            if constant.tensor.size != 1:
                return False
            continue
        node = current.producer()
        if node is None:
            return False
        if node.op_type in _ARITHMETIC | _KEPT and not node.domain:
            queue.extend(v for v in (node.inputs[:1] if node.op_type in _KEPT else node.inputs) if v is not None)
        elif not _is_one_length(node):
            return False
    return False


def _is_one_length(node: ir.Node) -> bool:
    """Whether a node puts out the length of one axis, or the number of all entries."""
    if node.domain:
        return False
    if node.op_type == "Size":
        return True
    if node.op_type == "Shape":
        end = attribute_int(node, "end", 0)
        return end - attribute_int(node, "start", 0) == 1
    shape = node.inputs[0].producer() if node.op_type in ("Gather", "Slice") and node.inputs[0] is not None else None
    if shape is None or shape.op_type != "Shape":
        return False
    bounds = [number for v in node.inputs[1:3] for number in small_ints(v) or ()]
    if node.op_type == "Gather":
        return len(bounds) == 1
    return len(bounds) == 2 and (bounds[1] - bounds[0] == 1 or (bounds[0] == -1 and bounds[1] > 0))
