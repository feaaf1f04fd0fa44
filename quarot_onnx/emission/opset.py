"""Raising the version of the standard operators that a graph imports, where that changes nothing it computes.

4-bit integers, and Q/DQ of 16 bits, came with opset 21, and exporters still write 17 or 18. Most operators were only
opened to further types in between, and keep their meaning; the reductions turned an attribute into an input, and Split
wants its number of parts. What else changed is refused.
"""

import numpy as np
import onnx_ir as ir

from quarot_onnx.errors import ConfigError
from quarot_onnx.graph.edit import Editor
from quarot_onnx.graph.query import label
from quarot_onnx.io.nodes import all_nodes
from quarot_onnx.io.opsets import STANDARD_DOMAINS, means_the_same

INT4_OPSET = 21
"""The first opset with 4-bit integers."""

_INT4_IR_VERSION = 10

_REDUCTIONS = frozenset(
    f"Reduce{what}" for what in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)
_REDUCTION_OPSET = 18


def raise_opset(editor: Editor, what: str, instead: str) -> None:
    """Import the first version with 4-bit integers instead of an older one; a newer one stays.

    Args:
        editor: Of the graph, which imports 13 or later.
        what: What needs it, for the message.
        instead: What to use instead.

    Raises:
        ConfigError: An operator in use changed its meaning in between; nothing has been changed then.
    """
    model = editor.model
    current = model.graph.opset_imports.get("", 1)
    if current < INT4_OPSET:
        nodes = [node for node in all_nodes(model.graph) if node.domain in STANDARD_DOMAINS]
        changed = [node for node in nodes if not means_the_same(node, current, INT4_OPSET)]
        for node in changed:
            if node.op_type not in _REDUCTIONS | {"Split"}:
                raise ConfigError(
                    f"{what} need opset {INT4_OPSET}; the model has {current}, and its {node.op_type} {label(node)!r} "
                    f"would change its meaning: export it with opset {INT4_OPSET}, or use {instead}"
                )
        for node in changed:
            if node.op_type in _REDUCTIONS and current < _REDUCTION_OPSET:
                _axes_as_input(editor, node)
            elif node.op_type == "Split" and len([v for v in node.inputs if v is not None]) == 1:
                editor.set_int(node, "num_outputs", len(node.outputs))
        model.graph.opset_imports[""] = INT4_OPSET
    model.ir_version = max(model.ir_version or 0, _INT4_IR_VERSION)


def _axes_as_input(editor: Editor, node: ir.Node) -> None:
    axes = node.attributes.pop("axes", None)
    if axes is None:
        return
    tensor = ir.Tensor(np.array(axes.as_ints(), dtype=np.int64))
    node.resize_inputs(2)
    node.replace_input_with(1, editor.initializer(f"{label(node)}_axes", tensor))
