"""The mark of nodes that an online rotation put into the graph, and where to find it again in a file that lost it.

The mark lies in the nodes' metadata_props. onnxruntime, when it saves an optimised model, leaves those out, extends the
names of what it fuses, and keeps those of initializers: a product with a factor of a rotation is known by the factor's
name, and what stands around it by the start of the names that nodes of one rotation share.
"""

import re

import onnx_ir as ir

from quarot_onnx.io.nodes import all_graphs, all_nodes

TAG = "quarot_onnx"
"""The key in a node's metadata_props."""

ONLINE = "online"
"""What it says of a node of an online rotation."""

FACTOR = "quarot/factor_"
"""Names of the factors of online rotations start with it."""

_PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Gemm"})
_MEMBER = re.compile(r"(.+/(?:R3|R4|pair|Balance))/(?:Shape|Reshape|MatMul|Sub|Transpose|Restore)(?:_\d+)?(?:/.*)?")
"""The name of a node of an online rotation, or of what was fused with one: that of the rotation, and its operator."""


def restore_marks(model: ir.Model) -> None:
    """Mark the nodes of online rotations where no node has a mark, but factors of such rotations are there."""
    if not any(FACTOR in name for graph in all_graphs(model) for name in graph.initializers if name):
        return
    nodes = list(all_nodes(model.graph))
    if any(TAG in node.metadata_props for node in nodes):
        return
    products = [node for node in nodes if node.op_type in _PRODUCTS and any(map(_is_factor, node.inputs))]
    stems = {_stem(node) for node in products} - {None}
    for node in (*products, *(node for node in nodes if _stem(node) in stems)):
        node.metadata_props[TAG] = ONLINE


def _is_factor(value: ir.Value | None) -> bool:
    """Whether a value is a factor, or one in another type."""
    if value is None:
        return False
    made = value.producer()
    if made is not None:
        return made.op_type == "Cast" and _is_factor(made.inputs[0])
    return value.is_initializer() and FACTOR in (value.name or "")


def _stem(node: ir.Node) -> str | None:
    """What the names of the nodes of the rotation that a node belongs to start with."""
    found = _MEMBER.fullmatch(node.name or "")
    return None if found is None else found[1]
