"""Which outputs of a graph carry on which of its inputs: the caches, told by how the graph joins them.

::

    past ── (layout) ── Concat, ScatterND, GroupQueryAttention, Attention ... ── (layout) ── present

Names and positions take no part: a past belongs to the output that it flows into.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from quarot_onnx.graph.numbers import is_one_of_lengths
from quarot_onnx.graph.query import FLOAT_TYPES, PASS_THROUGH, consumers, data_input, resolve_constant

FUSED_CACHES: Mapping[tuple[str, str], Mapping[int, int]] = {
    ("com.microsoft", "GroupQueryAttention"): {3: 1, 4: 2},
    ("com.microsoft", "PagedAttention"): {3: 1, 4: 2},
    ("com.microsoft", "SparseAttention"): {3: 1, 4: 2},
    ("com.microsoft", "MultiHeadAttention"): {6: 1, 7: 2},
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): {5: 1, 6: 2},
    ("com.microsoft", "Attention"): {4: 1},
    ("", "Attention"): {4: 1, 5: 2},
}
"""Fused attentions: the input of a past, and the output that carries it on."""

_LAYOUTS = frozenset(
    {
        "Clip", "DequantizeLinear", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Pad",
        "QuantizeLinear", "Reshape", "Scatter", "ScatterElements", "ScatterND", "Slice", "Split", "Squeeze",
        "TensorScatter", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Operators that put their first input in another layout, or put what is new into it."""

_CACHE_TYPES = FLOAT_TYPES | {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT8E4M3FN}

Step = Callable[[ir.Node, int], list[ir.Value]]
"""From a node and the index of the input by which it is reached: the outputs to follow."""


@dataclass(frozen=True)
class IntegerCache:
    """What GroupQueryAttention keeps in integers.

    Attributes:
        made: It is read off a value that the graph makes, such as a prefix and what comes in, and not off an input.
        dtype: The floats that the operator computes in.
    """

    made: bool
    dtype: ir.DataType


def reads_integers(model: ir.Model) -> IntegerCache | None:
    """The caches of integers of a model's GroupQueryAttentions; None where none keeps one."""
    nodes = [node for node in model.graph.all_nodes() if node.op_type == "GroupQueryAttention" and _in_integers(node)]
    if not nodes:
        return None
    pasts = (value for node in nodes for value in node.inputs[3:5])
    return IntegerCache(any(value is not None and not value.is_graph_input() for value in pasts), computes_in(nodes[0]))


def computes_in(node: ir.Node) -> ir.DataType:
    """The floats that a GroupQueryAttention computes in; float16 where the graph does not say."""
    stated = (value.dtype for value in (*node.inputs[:3], node.outputs[0], *node.inputs[7:9]) if value is not None)
    return next((dtype for dtype in stated if dtype is not None), ir.DataType.FLOAT16)


def _in_integers(node: ir.Node) -> bool:
    kinds = [node.attributes.get(f"{which}_quant_type") for which in "kv"]
    return any(kind is not None and kind.as_string().upper() != "NONE" for kind in kinds)


def forward(starts: list[ir.Value], step: Step) -> Iterator[ir.Value]:
    """All values that ``step`` leads to, the starts among them, the nearest first; each once."""
    seen, queue = set(starts), list(starts)
    while queue:
        value = queue.pop(0)
        yield value
        for node, index in consumers(value):
            fresh = [out for out in step(node, index) if out not in seen]
            seen.update(fresh)
            queue.extend(fresh)


def presents(graph: ir.Graph) -> dict[ir.Value, tuple[ir.Value, ...]]:
    """The outputs that carry on an input, for every input that an output carries on.

    Args:
        graph: The graph.

    Returns:
        Past to presents, the nearest first. More than one where the graph puts out copies. An output that several
        inputs flow into belongs to none of them.
    """
    outputs = set(graph.outputs)
    found = {
        past: tuple(value for value in forward([past], _carried) if value in outputs and _fits(past, value))
        for past in graph.inputs
        if past.dtype in _CACHE_TYPES and past.name not in graph.initializers
    }
    counts: dict[ir.Value, int] = {}
    for values in found.values():
        for value in values:
            counts[value] = counts.get(value, 0) + 1
    own = {past: tuple(value for value in values if counts[value] == 1) for past, values in found.items()}
    return {past: values for past, values in own.items() if values}


def _carried(node: ir.Node, index: int) -> list[ir.Value]:
    """The outputs in which the past that a node reads lives on."""
    fused = FUSED_CACHES.get((node.domain, node.op_type))
    if fused is not None:
        out = fused.get(index)
        return [] if out is None or out >= len(node.outputs) else [node.outputs[out]]
    joins = node.op_type == "Concat" or (node.op_type == "Where" and index > 0)
    if joins or (index == 0 and node.op_type in _LAYOUTS | PASS_THROUGH):
        return list(node.outputs)
    factor = data_input(node, 1 - index) if node.op_type in ("Mul", "Div") else None
    scales = factor is not None and (resolve_constant(factor) is not None or is_one_of_lengths(factor))
    return list(node.outputs) if scales else []


def pasts_behind(value: ir.Value | None) -> list[ir.Value]:
    """The float inputs of the graph that a value holds, in another layout or joined with what is new.

    Args:
        value: What an attention reads as K or V; None: nothing.
    """
    found, seen, queue = [], {value}, [] if value is None else [value]
    while queue:
        current = queue.pop(0)
        node = current.producer()
        if node is None and current.is_graph_input() and current.dtype in _CACHE_TYPES:
            found.append(current)
        elif node is not None:
            held = [v for i, v in enumerate(node.inputs) if v is not None and current in _carried(node, i)]
            queue.extend(v for v in held if v not in seen)
            seen.update(held)
    return found


def _fits(past: ir.Value, present: ir.Value) -> bool:
    """Whether an output can be fed back: of one type and rank, and of one shape but for the positions."""
    if past.dtype is not None and present.dtype is not None and past.dtype != present.dtype:
        return False
    if past.shape is None or present.shape is None:
        return True
    pairs = list(zip(past.shape, present.shape, strict=False))
    other = sum(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
    return len(past.shape) == len(present.shape) and other <= 1
