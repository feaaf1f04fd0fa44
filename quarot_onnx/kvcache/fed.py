"""A prefix that GroupQueryAttention is fed as new tokens, in front of the caller's first prompt.

See :mod:`quarot_onnx.prefix.fused`. What rounds new keys and values leaves it out, as it is constant behind a past.
"""

import onnx_ir as ir

from quarot_onnx.emission.writer import Writer
from quarot_onnx.errors import ModelError
from quarot_onnx.graph.query import attribute_int, data_input, label, resolve_constant
from quarot_onnx.io.tensors import read_array
from quarot_onnx.kvcache.places import FusedPlace
from quarot_onnx.rotation.rope import TOTAL


def prefix_length(place: FusedPlace, so: str) -> int:
    """How many tokens stand before the caller's: what is taken off the presents again.

    Args:
        place: A GroupQueryAttention.
        so: What follows where it cannot be told, and the way out.

    Raises:
        ModelError: It cannot be told.
    """
    maker = place.keys.present.producer()
    if maker is place.node:
        return 0
    start = resolve_constant(maker.inputs[1]) if maker is not None and maker.op_type == "Slice" else None
    length = None if start is None else int(read_array(start.tensor).reshape(-1)[0])
    if maker is None or length is None or length < 0 or maker.inputs[0] is not place.node.outputs[1]:
        raise ModelError(f"{label(place.node)}: what stands between it and its cache is not understood, so {so}")
    return length


def fed_tokens(writer: Writer, node: ir.Node) -> ir.Value:
    """How many tokens the operator reads as new, [1]."""
    return writer.add(node, "Gather", writer.add(node, "Shape", data_input(node, 0)), writer.ints(1), axis=0)


def total_tokens(writer: Writer, node: ir.Node) -> ir.Value:
    """How many there are with those of the past, [1]."""
    total = writer.add(node, "Cast", data_input(node, TOTAL), to=int(ir.DataType.INT64))
    return writer.add(node, "Reshape", total, writer.ints(1))


def fresh_tokens(writer: Writer, node: ir.Node, fed: ir.Value, total: ir.Value, prefix: int) -> ir.Value:
    """How many tokens of a prefix are fed as new ones, [1]: all at a first prompt, else none."""
    prompt = writer.add(node, "Cast", writer.add(node, "Equal", fed, total), to=int(ir.DataType.INT64))
    return writer.add(node, "Mul", prompt, writer.ints(prefix))


def behind_prefix(value: ir.Value) -> ir.Value:
    """What follows a prefix in an input of the operator; the input itself where none is joined right there."""
    node = value.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2 or attribute_int(node, "axis", 0) != 1:
        return value
    return data_input(node, 1)
