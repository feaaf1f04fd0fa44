"""Products with constant matrices that quantization does not know: they stay in float, and the user is told.

Linears that a configuration leaves out are the user's choice and not told; neither are vectors (RoPE's frequencies).
"""

from collections.abc import Collection, Iterator, Sequence

import onnx_ir as ir

from quarot_onnx.config import QConfig
from quarot_onnx.config.enums import OpType
from quarot_onnx.config.rules import leaves_out
from quarot_onnx.errors import first_and_more
from quarot_onnx.graph.linear import LINEAR_OPS, linear_at
from quarot_onnx.graph.query import FLOAT_TYPES, label, resolve_constant
from quarot_onnx.graph.tags import is_online
from quarot_onnx.io.nodes import all_nodes, subgraphs

_PRODUCTS = LINEAR_OPS | {
    "Attention",
    "Conv",
    "ConvTranspose",
    "Einsum",
    "FusedConv",
    "FusedGemm",
    "GRU",
    "LSTM",
    "MoE",
    "RNN",
}
_SHOWN = 3
"""So many nodes of a kind are named."""


def left_in_float(graph: ir.Graph, config: QConfig) -> tuple[str, ...]:
    """What stays in float and why: one note for each reason.

    Args:
        graph: The float graph.
        config: What is quantized.

    Returns:
        The notes; none where every product with a constant matrix is a Linear.
    """
    if not any(kind is not OpType.Gather for kind in config.op_types_to_quantize):
        return ()
    varying = _varying(graph)
    found: dict[str, list[str]] = {}
    for node, container in _nodes(graph):
        if node.op_type not in _PRODUCTS or is_online(node) or (container is None and linear_at(node) is not None):
            continue
        reason = _reason(node, container, varying)
        if reason is not None and not leaves_out(config.exclude, config.nodes_to_quantize, label(node)):
            found.setdefault(reason, []).append(label(node))
    return tuple(_note(names, reason) for reason, names in found.items())


def _note(names: Sequence[str], reason: str) -> str:
    if len(names) == 1:
        return f"{names[0]} stays in float: {reason}"
    return f"{len(names)} nodes stay in float ({first_and_more(names, _SHOWN)}): {reason}"


def _nodes(graph: ir.Graph, container: ir.Node | None = None) -> Iterator[tuple[ir.Node, ir.Node | None]]:
    """Every node, with the node of the main graph in whose subgraphs it is."""
    for node in graph:
        yield node, container
        for inner in subgraphs(node):
            yield from _nodes(inner, container or node)


def _reason(node: ir.Node, container: ir.Node | None, varying: Collection[ir.Value]) -> str | None:
    """Why a product with a constant matrix is not quantized; None for one without."""
    fixed = {i: value for i, value in enumerate(node.inputs) if value is not None and value not in varying}
    matrices = {i: sources for i, value in fixed.items() if any(map(_is_matrix, sources := _sources(value)))}
    if not matrices or {0, 1} <= fixed.keys():
        return None
    if any(source.is_graph_input() for sources in matrices.values() for source in sources):
        return "the weight is an input with a default, which whoever runs the model may replace"
    if container is not None:
        return f"the node is inside the {container.op_type} {label(container)}"
    if node.op_type not in LINEAR_OPS:
        return f"{node.op_type} is not quantized here, only MatMul, Gemm and FusedMatMul"
    return _why_no_linear(node, matrices)


def _why_no_linear(node: ir.Node, matrices: Collection[int]) -> str:
    """What about a MatMul, Gemm or FusedMatMul keeps it from being a Linear."""
    if 1 not in matrices:
        return "the weight is the first operand, not the second"
    weight = resolve_constant(node.inputs[1])
    if weight is None:
        return "the weight is computed from constants, not stored as it is used"
    if len(weight.shape) != 2:
        return f"the weight has {len(weight.shape)} axes, not 2"
    if node.op_type == "Gemm":
        return "the bias is not constant"
    return "the node transposes an operand inside"


def _varying(graph: ir.Graph) -> set[ir.Value]:
    """Every value that an input without a default, or chance, has a part in."""
    found = {value for value in graph.inputs if not value.is_initializer()}
    for node in all_nodes(graph):
        for body in subgraphs(node):
            found.update(body.inputs)
        operands = [value for value in node.inputs if value is not None]
        made_of_none = not operands and node.op_type != "Constant"
        if made_of_none or any(subgraphs(node)) or any(value in found for value in operands):
            found.update(node.outputs)
    return found


def _sources(value: ir.Value) -> set[ir.Value]:
    """The initializers, and the outputs of Constant nodes, that a value which does not vary is computed from."""
    seen, frontier = {value}, [value]
    while frontier:
        node = frontier.pop().producer()
        fresh = {v for v in node.inputs if v is not None and v not in seen} if node is not None else set()
        seen |= fresh
        frontier.extend(fresh)
    return {v for v in seen if v.is_initializer() or (p := v.producer()) is None or not p.inputs}


def _is_matrix(source: ir.Value) -> bool:
    """Whether a float tensor has two axes longer than 1, or, of an input with a default, may have."""
    constant = resolve_constant(source)
    if constant is not None:
        return constant.tensor.dtype in FLOAT_TYPES and sum(length > 1 for length in constant.shape) > 1
    lengths = [length for length in source.shape or () if not isinstance(length, int) or length > 1]
    return source.dtype in FLOAT_TYPES and len(lengths) > 1
