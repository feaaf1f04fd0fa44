"""The mark of nodes that an online rotation put into the graph; it is saved with the model (see :mod:`.io.marks`)."""

import onnx_ir as ir

from quarot_onnx.io.marks import ONLINE, TAG

PREFIX = "quarot/prefix"
"""How the names of nodes begin that put a prefix into a graph."""


def mark_online(node: ir.Node) -> None:
    """Mark a node as part of an online rotation."""
    node.metadata_props[TAG] = ONLINE


def is_online(node: ir.Node) -> bool:
    """Whether a node is part of an online rotation: no Linear of the model, whatever its operator."""
    return node.metadata_props.get(TAG) == ONLINE
