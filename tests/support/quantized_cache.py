"""Nodes of a cache that holds integers and, in further pasts and presents, a scale for each token.

Keys are int8, values 4 bits, two of them in a byte of uint8. ``axes`` is the rank of the scales: 4 for
``[batch, heads, positions, 1]``, 3 for ``[batch, heads, positions]``, 2 for ``[batch, positions]``, one for all heads.
"""

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

HEADS, HEAD_DIM = 2, 4
CONSTANTS = {
    "q127": np.float32(127),
    "q7": np.float32(7),
    "q8": np.float32(8),
    "q16": np.float32(16),
    "over_width": np.array([3]),
    "over_heads": np.array([1, 3]),
}


def quantized(new: str, part: str, axes: int) -> tuple[list[NodeProto], list[ValueInfoProto], list[ValueInfoProto]]:
    """What is new ``[batch, heads, positions, head_dim]`` put into the cache ``part``, read as ``{part}_read``.

    Returns:
        Nodes, past inputs and present outputs, the integers first.
    """
    packed = part == "value"
    dtype, width = (TensorProto.UINT8, HEAD_DIM // 2) if packed else (TensorProto.INT8, HEAD_DIM)
    reduced = "over_heads" if axes == 2 else "over_width"
    largest, now = f"{part}_largest", f"{part}_now"
    nodes = [
        helper.make_node("Abs", [new], [f"{part}_abs"]),
        helper.make_node("ReduceMax", [f"{part}_abs", reduced], [largest], keepdims=1),
        helper.make_node("Div", [largest, "q7" if packed else "q127"], [f"{part}_scale4"]),
        helper.make_node("Div", [new, f"{part}_scale4"], [f"{part}_divided"]),
        helper.make_node("Round", [f"{part}_divided"], [f"{part}_round"]),
    ]
    if packed:
        nodes += [
            helper.make_node("Add", [f"{part}_round", "q8"], [f"{part}_up"]),
            helper.make_node("Split", [f"{part}_up"], [f"{part}_low", f"{part}_high"], axis=3, num_outputs=2),
            helper.make_node("Mul", [f"{part}_high", "q16"], [f"{part}_shifted"]),
            helper.make_node("Add", [f"{part}_low", f"{part}_shifted"], [f"{part}_byte"]),
        ]
    source = f"{part}_byte" if packed else f"{part}_round"
    nodes.append(helper.make_node("Cast", [source], [now], to=dtype))
    small = f"{part}_scale4"
    if axes < 4:
        small = f"{part}_scale"
        nodes.append(helper.make_node("Squeeze", [f"{part}_scale4", reduced], [small]))
    shape = {4: ["b", HEADS, "{}", 1], 3: ["b", HEADS, "{}"], 2: ["b", "{}"]}[axes]
    past, present = f"past_key_values.0.{part}", f"present.0.{part}"
    nodes += [
        helper.make_node("Concat", [past, now], [present], axis=2),
        helper.make_node("Concat", [f"{past}_scale", small], [f"{present}_scale"], axis=min(2, axes - 1)),
        helper.make_node("Cast", [present], [f"{part}_held"], to=TensorProto.FLOAT),
    ]
    values = f"{part}_held"
    if packed:
        nodes += [
            helper.make_node("Mod", [values, "q16"], [f"{part}_lower"], fmod=1),
            helper.make_node("Div", [values, "q16"], [f"{part}_shift"]),
            helper.make_node("Floor", [f"{part}_shift"], [f"{part}_upper"]),
            helper.make_node("Concat", [f"{part}_lower", f"{part}_upper"], [f"{part}_both"], axis=3),
            helper.make_node("Sub", [f"{part}_both", "q8"], [f"{part}_integers"]),
        ]
        values = f"{part}_integers"
    scales = f"{present}_scale"
    if axes < 4:
        nodes.append(helper.make_node("Unsqueeze", [scales, reduced], [f"{part}_scales"]))
        scales = f"{part}_scales"
    nodes.append(helper.make_node("Mul", [values, scales], [f"{part}_read"]))
    ends = []
    for name, length in ((past, "past"), (present, "t")):
        cached = helper.make_tensor_value_info(name, dtype, ["b", HEADS, length, width])
        scale = [length if dim == "{}" else dim for dim in shape]
        ends.append([cached, helper.make_tensor_value_info(f"{name}_scale", TensorProto.FLOAT, scale)])
    return nodes, ends[0], ends[1]
