"""onnx's shape inference of a graph, without its weights.

onnx knows nothing of onnxruntime's operators; each of those that its optimiser makes is replaced, for inference, with
what has the same shape.
"""

from collections.abc import Iterator, Sequence

import onnx
import onnx_ir as ir

from quarot_onnx.graph.query import attribute_int

Lengths = tuple[int | None, ...]
"""A shape, unknown lengths as None."""

_SMALL = 1000  # bytes; a larger tensor is no shape, and inference takes it for an input


def inferred(model: ir.Model) -> dict[str, tuple[ir.DataType | None, Lengths | None]]:
    """The types and shapes of a graph's values by name, as far as onnx can say; the model is left as it is."""
    import onnx.shape_inference  # noqa: PLC0415 - 50 ms, with the checker

    proto = _skeleton(model)
    try:
        found = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
    except Exception:  # noqa: BLE001 - of a wrong graph it raises anything; what the exporter wrote stays
        found = proto
    infos = (*found.graph.input, *found.graph.output, *found.graph.value_info)
    return {info.name: (_dtype(info.type), _lengths(info.type)) for info in infos}


def _dtype(kind: onnx.TypeProto) -> ir.DataType | None:
    if kind.HasField("tensor_type"):
        return ir.DataType(kind.tensor_type.elem_type)
    found = ir.serde.deserialize_type_proto_for_type(kind)
    return None if found is None else found.dtype


def _lengths(kind: onnx.TypeProto) -> Lengths | None:
    if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.tensor_type.shape.dim)


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    """The graph with small tensors only; the others are inputs, as are those that have a default."""
    proto = onnx.ModelProto(ir_version=model.ir_version)
    proto.opset_import.extend(onnx.OperatorSetIdProto(domain=d, version=v) for d, v in model.opset_imports.items())
    graph = proto.graph
    graph.name = model.graph.name or "graph"
    for value in model.graph.inputs:
        ir.serde.serialize_value_into(graph.input.add(), value)
    given = set(model.graph.inputs)
    for value in model.graph.initializers.values():
        if value in given:  # a default: another value, of another length, may be fed
            continue
        _add_initializer(graph, value)
    ends = set(model.graph.outputs)
    for node in model.graph:
        graph.node.extend(_spelt(node))
        for output in node.outputs:
            if output.type is not None and output.name and output not in ends:
                ir.serde.serialize_value_into(graph.value_info.add(), output)
    for value in model.graph.outputs:
        ir.serde.serialize_value_into(graph.output.add(), value)
    for function in model.functions.values():
        ir.serde.serialize_function_into(proto.functions.add(), function)
    return proto


def _add_initializer(graph: onnx.GraphProto, value: ir.Value) -> None:
    tensor, info = value.const_value, graph.input.add()
    info.name = value.name or ""
    kind = value.type if value.type is not None or tensor is None else ir.TensorType(tensor.dtype)
    shape = value.shape if value.shape is not None or tensor is None else tensor.shape
    if kind is not None:
        ir.serde.serialize_type_into(info.type, kind)
        if shape is not None:
            ir.serde.serialize_shape_into(info.type, shape)
    if tensor is not None and tensor.nbytes <= _SMALL:
        kept = graph.initializer.add()
        ir.serde.serialize_tensor_into(kept, tensor)
        kept.name = info.name


_LIKE_INPUT = frozenset(
    {
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "BiasGelu",
        "FastGelu",
        "Gelu",
        "QuickGelu",
        "BiasSoftmax",
        "RotaryEmbedding",
    }
)
"""Operators of onnxruntime whose first output (and a Skip-norm's sum) has the shape of their first input."""

_SKIP_SUM = 3


def _spelt(node: ir.Node) -> Iterator[onnx.NodeProto]:
    """A node, or what stands in for one that onnx does not know; without its metadata, which may be long."""
    known = node.domain == "" and node.op_type != "SimplifiedLayerNormalization"
    x = node.inputs[0] if node.inputs else None
    if x is not None and not known and node.op_type in _LIKE_INPUT:
        for index in (0, _SKIP_SUM):
            if index < len(node.outputs) and node.outputs[index].name:
                yield _node("Identity", [x], [node.outputs[index]])
    elif x is not None and not known and node.op_type == "FusedMatMul":
        product = _node("Einsum", node.inputs, node.outputs)
        product.attribute.append(onnx.helper.make_attribute("equation", _equation(node)))
        yield product
    else:
        same = _node(node.op_type, node.inputs, node.outputs)
        same.domain, same.overload = node.domain, node.overload
        for attribute in node.attributes.values():
            if attribute.is_ref():
                ir.serde.serialize_reference_attribute_into(same.attribute.add(), attribute)
            else:
                ir.serde.serialize_attribute_into(same.attribute.add(), attribute)
        yield same


def _node(op_type: str, inputs: Sequence[ir.Value | None], outputs: Sequence[ir.Value]) -> onnx.NodeProto:
    node = onnx.NodeProto(op_type=op_type)
    node.input.extend("" if value is None else value.name or "" for value in inputs)
    node.output.extend(value.name or "" for value in outputs)
    return node


def _equation(product: ir.Node) -> str:
    """A FusedMatMul in Einsum's notation; its attributes are explained in ``graph.products``."""
    sides = []
    for side, axes in (("A", ("m", "k")), ("B", ("k", "n"))):
        first, last = reversed(axes) if attribute_int(product, f"trans{side}", 0) else axes
        sides.append(f"{first}...{last}" if attribute_int(product, f"transBatch{side}", 0) else f"...{first}{last}")
    return f"{','.join(sides)}->...mn"
