"""Down projections that are not seen to write to the residual stream: R4 is left out there.

They are those of experts, whose results are weighed before they are added, and of blocks behind a LayerNorm.
"""

from collections.abc import Collection, Iterator

import onnx_ir as ir

from quarot_onnx.graph.linear import Linear, linear_producing, linears
from quarot_onnx.graph.query import resolve_constant, through
from quarot_onnx.sites.model import Kind, LeftOut
from quarot_onnx.sites.operands import LAYOUT
from quarot_onnx.sites.stream import Stream

_ACTIVATIONS = frozenset(
    {
        "BiasGelu", "Clip", "Elu", "Erf", "FastGelu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Pow",
        "QuickGelu", "Relu", "Sigmoid", "Softplus", "Swish", "Tanh",
    }
)  # fmt: skip
_MOVES = LAYOUT | {"Split", "Slice"}
_PASSED = _ACTIVATIONS | _MOVES | {"Add", "Div", "Mul", "Sub"}

_STEPS = 32
"""A spelt-out GELU and its gate take about ten nodes."""


def unwritten_downs(graph: ir.Graph, stream: Stream, outputs: Collection[ir.Node]) -> list[LeftOut]:
    """Why R4 does not go to the down projections of a decoder that its stream does not show.

    Args:
        graph: The graph.
        stream: Its stream, with a writer at least.
        outputs: The output Linears of attentions.
    """
    known = {linear.node for linear in stream.writers} | set(outputs)
    found = [linear for linear in linears(graph) if linear.node not in known and _is_down(linear, stream.hidden_size)]
    reason = "seems to be an MLP's down projection, but is not seen to write to the residual stream"
    return [LeftOut(linear.name, reason, Kind.R4) for linear in found]


def _is_down(linear: Linear, hidden_size: int) -> bool:
    """Whether a Linear makes ``hidden_size`` values of nothing but what other Linears make, activated."""
    if linear.out_features != hidden_size:
        return False
    before = list(_before(linear.input))
    ends = [linear_producing(value) for value, passed in before if not passed]
    nodes = [value.producer() for value, passed in before if passed]
    activated = any(node is not None and node.op_type in _ACTIVATIONS for node in nodes)
    wide = {end.out_features for end in ends if end is not None}
    return activated and None not in ends and bool(wide & {linear.in_features, 2 * linear.in_features})


def _before(value: ir.Value) -> Iterator[tuple[ir.Value, bool]]:
    """What a value is computed from entry by entry, but for constants, and whether that goes on behind it."""
    seen, frontier = set[ir.Value](), [value]
    while frontier and len(seen) < _STEPS:
        current = through(frontier.pop(0))
        node = current.producer()
        if current in seen or resolve_constant(current) is not None:
            continue
        seen.add(current)
        passed = node is not None and node.op_type in _PASSED and linear_producing(current) is None
        yield current, passed
        if node is not None and passed:
            operands = node.inputs[:1] if node.op_type in _MOVES else node.inputs
            frontier.extend(operand for operand in operands if operand is not None)
