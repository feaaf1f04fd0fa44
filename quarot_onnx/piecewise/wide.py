"""16-bit floats handed from piece to piece as 32-bit ones, so that nothing is rounded that the whole does not round.

onnxruntime computes with 16-bit floats as 32-bit ones on a CPU. It puts a Cast before and behind such a node, and takes
out again those that undo each other, also where digits are lost between them: from node to node values stay as they
were computed. It knows its own by their names, so that a Cast of such a name at the end of a piece is taken out as
well. Should another version not know them, values are rounded to 16 bits where they are handed on, as the graph says.
"""

from collections.abc import Sequence

import onnx_ir as ir

from quarot_onnx.graph.query import SIZE_ONLY
from quarot_onnx.io.halves import HALVES

_OWN = "InsertedPrecisionFreeCast_"


def wide_name(value: ir.Value) -> str:
    """The name of what is handed on of a value."""
    return f"{value.name}/float32" if value.dtype in HALVES else str(value.name)


def widen(graph: ir.Graph, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> None:
    """Let a piece take and put out values of 16 bits as 32-bit ones.

    Args:
        graph: The piece; those of its outputs that are not handed on stay beside these.
        inputs: Inputs of it that earlier pieces hand on.
        outputs: Values in it that are handed on.
    """
    for value in outputs:
        if value.dtype in HALVES:
            cast = _cast(value, ir.DataType.FLOAT)
            # A Cast that something else reads as 16 bits stays in; for its shape alone it need not.
            for use in tuple(value.uses()):
                if use.node.op_type in SIZE_ONLY and use.node is not cast:
                    use.node.replace_input_with(use.idx, cast.outputs[0])
            producer = value.producer()
            assert producer is not None, "constants and inputs are not handed on"
            graph.insert_after(producer, cast)
            graph.outputs.append(_named(cast.outputs[0], wide_name(value), ir.DataType.FLOAT, value.shape))
        else:
            graph.outputs.append(value)
    for value in inputs:
        if value.dtype in HALVES:
            narrow, name = value.dtype, value.name
            uses = tuple(value.uses())
            _named(value, wide_name(value), ir.DataType.FLOAT, value.shape)
            cast = _cast(value, narrow)
            _named(cast.outputs[0], str(name), narrow, value.shape)
            for node, index in uses:
                node.replace_input_with(index, cast.outputs[0])
            graph.insert_before(graph[0], cast)


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    return ir.node("Cast", [value], {"to": dtype}, name=f"{_OWN}{value.name}/handed")


def _named(value: ir.Value, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> ir.Value:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), shape
    return value
