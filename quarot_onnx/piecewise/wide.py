"""16-bit floats handed from piece to piece as 32-bit ones, so that nothing is rounded that the whole does not round.

onnxruntime computes with 16-bit floats as 32-bit ones on a CPU. It puts a Cast before and behind such a node, and takes
out again those that undo each other, also where digits are lost between them: from node to node values stay as they
were computed. It knows its own by their names, so that a Cast of such a name at the end of a piece is taken out as
well. Should another version not know them, values are rounded to 16 bits where they are handed on, as the graph says.

Weights go in the same way. onnxruntime widens those of a session with one thread, into memory that is new for every
piece and more than once; here all cores do that, into memory that the piece before has left.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.graph.query import SIZE_ONLY
from quarot_onnx.io import halves
from quarot_onnx.io.halves import HALVES
from quarot_onnx.io.memory import large_array
from quarot_onnx.io.tensors import read_array, read_rows
from quarot_onnx.threads import Scratch, spread

_OWN = "InsertedPrecisionFreeCast_"

_PRODUCTS = frozenset({"MatMul", "Gemm"})

_PART = 1 << 20
"""Weights that are read and widened together."""

_scratch = Scratch()


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
            _narrow(graph, value)


def _narrow(graph: ir.Graph, value: ir.Value) -> None:
    """Let a value of a piece come as 32-bit floats, under another name, and make of it what it was."""
    narrow, name, uses = value.dtype, value.name, tuple(value.uses())
    assert narrow is not None, "asked before"
    _named(value, wide_name(value), ir.DataType.FLOAT, value.shape)
    cast = _cast(value, narrow)
    _named(cast.outputs[0], str(name), narrow, value.shape)
    for node, index in uses:
        node.replace_input_with(index, cast.outputs[0])
    graph.insert_before(graph[0], cast)


def take_out_weights(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    """Let a piece take its float16 weights from outside, as 32-bit floats: those that are multiplied by alone.

    Args:
        graph: The piece.

    Returns:
        The weights by the names of the inputs, to be fed by ``read_wide``.
    """
    found: dict[str, ir.TensorProtocol] = {}
    for value in tuple(graph.initializers.values()):
        tensor, uses = value.const_value, value.uses()
        if tensor is None or tensor.dtype != ir.DataType.FLOAT16 or len(tensor.shape) != 2 or value.is_graph_output():
            continue
        if value.is_graph_input() or not all(use.idx == 1 and use.node.op_type in _PRODUCTS for use in uses):
            continue
        graph.initializers.pop(str(value.name))
        value.const_value = None
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        _narrow(graph, value)
        graph.inputs.append(value)
        found[str(value.name)] = tensor
    return found


def read_wide(tensor: ir.TensorProtocol) -> NDArray[np.float32]:
    """A float16 weight as 32-bit floats.

    Args:
        tensor: [rows, columns].
    """
    rows, columns = tensor.shape.numpy()
    wide = large_array((rows, columns), np.float32)
    array = None if isinstance(tensor, ir.ExternalTensor) else read_array(tensor, own=False)
    step = max(1, _PART // max(1, columns))

    def widen_rows(start: int) -> None:
        stop = min(start + step, rows)
        if array is None:
            into = _scratch.array("rows", (stop - start, columns), np.float16)
            halves.widen(read_rows(tensor, start, stop, into), wide[start:stop])
        else:
            halves.widen(array[start:stop], wide[start:stop])

    spread(widen_rows, range(0, rows, step))
    return wide


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    return ir.node("Cast", [value], {"to": dtype}, name=f"{_OWN}{value.name}/handed")


def _named(value: ir.Value, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> ir.Value:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), shape
    return value
