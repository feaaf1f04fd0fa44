"""Models without names: what looks at names gets nothing to look at."""

import onnx_ir as ir
from onnx_ir.traversal import RecursiveGraphIterator


def rename_all(model: ir.Model, *, node_names: bool = True) -> None:
    """Give every value, the graph's inputs, outputs and initializers included, and every node a meaningless name.

    Args:
        model: Changed in place.
        node_names: False for nodes without any name.
    """
    values = dict.fromkeys((*model.graph.inputs, *model.graph.initializers.values()))
    for number, node in enumerate(RecursiveGraphIterator(model.graph)):
        node.name = f"q{number}" if node_names else ""
        node.metadata_props.clear()
        values |= dict.fromkeys(value for value in node.outputs if value.name)
    for number, value in enumerate(values):
        value.name = f"z{number}"
