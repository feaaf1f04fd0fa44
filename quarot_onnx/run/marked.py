"""Whether the online rotations that a recipe tells of are found in the graph.

A file that something saved anew may have lost the nodes' marks, and the names by which they are found again
(:mod:`.io.marks`). A Hadamard that is not known for one would be quantized as a Linear.
"""

import onnx_ir as ir

from quarot_onnx.errors import ModelError
from quarot_onnx.graph.linear import LINEAR_OPS, linears
from quarot_onnx.graph.tags import is_online
from quarot_onnx.run.provenance import Record, counts_of

_PASSED = frozenset({"Reshape", "Cast", "Transpose"})
"""What may stand between a rotation's last product and the Linear that reads it."""


def refuse_lost_marks(graph: ir.Graph, recipe: Record) -> None:
    """Refuse a rotated model whose online rotations are not all found.

    Args:
        graph: Of the model.
        recipe: Of the model, which tells of a rotation.

    Raises:
        ModelError: Fewer are found than the recipe tells of.
    """
    counts = counts_of(recipe)
    before = [product for linear in linears(graph) if (product := _product_behind(linear.input)) is not None]
    others = {node for node in graph if node.op_type in LINEAR_OPS and is_online(node)}.difference(before)
    found = {"R3": len(others), "R4": len(before)}
    wanted = {"R3": counts.get("R3", 0), "R4": counts.get("R4", 0) + counts.get("online_pairs", 0)}
    for kind, count in wanted.items():
        if found[kind] < count:
            raise ModelError(
                f"the model was rotated with {kind} at {count} places, as its recipe says, and {found[kind]} are found "
                "in its graph: what saved the file since has renamed them, and their matrices would be quantized as "
                "Linears; quantize the rotated file itself, and optimize the output of that"
            )


def _product_behind(value: ir.Value) -> ir.Node | None:
    """The product of an online rotation that makes a value, or None."""
    node = value.producer()
    while node is not None and node.op_type in _PASSED and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type in LINEAR_OPS and is_online(node) else None
