"""Decoders with a block that is not as detection knows it, made of others."""

import cached_decoder as cached
import numpy as np
import onnx
from onnx import helper, numpy_helper


def behind(model: onnx.ModelProto, value: str, op: str = "Tanh", *more: str) -> onnx.ModelProto:
    """Whoever reads ``value`` reads what ``op`` makes of it, and of ``more``."""
    out = f"{value}_{op}"
    for node in model.graph.node:
        node.input[:] = [out if name == value else name for name in node.input]
    index = next(i for i, node in enumerate(model.graph.node) if value in node.output)
    model.graph.node.insert(index + 1, helper.make_node(op, [value, *more], [out], name=f"node_{out}"))
    return model


def without_softmax(model: onnx.ModelProto, layer: int) -> onnx.ModelProto:
    """The Softmax of a layer is spelt out, which makes its attention a strange one."""
    nodes = list(model.graph.node)
    softmax = [node for node in nodes if node.op_type == "Softmax"][layer]
    name, index = softmax.output[0], nodes.index(softmax)
    spelt = [
        helper.make_node("Exp", [softmax.input[0]], [f"{name}_exp"], name=f"{name}_exp"),
        helper.make_node("ReduceSum", [f"{name}_exp", "last_of_all"], [f"{name}_sum"], name=f"{name}_sum", keepdims=1),
        helper.make_node("Div", [f"{name}_exp", f"{name}_sum"], [name], name=f"{name}_div"),
    ]
    if all(tensor.name != "last_of_all" for tensor in model.graph.initializer):
        model.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "last_of_all"))
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:index], *spelt, *nodes[index + 1 :]])
    return model


def encoded() -> onnx.ModelProto:
    """A decoder that attends to what an encoder of one attention, in the same graph, makes of ``encoder``."""
    model, out = cached.build(cross="made"), cached._Writer(7)
    query, key, value = (out.heads("encoder", f"encoder_{part}") for part in "qkv")
    out.linear(out.context(query, key, value, 0, "encoder_"), "encoder_W", "encoded", cached.HIDDEN, cached.HIDDEN)
    for node in model.graph.node:
        node.input[:] = ["encoded" if name == "encoder" else name for name in node.input]
    nodes = [*out.nodes, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in out.constants.items())
    return model
