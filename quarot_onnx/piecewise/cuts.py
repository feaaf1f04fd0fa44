"""A graph cut into pieces that are run one after the other, so that the weights of one alone are in memory.

The nodes that depend on an input, in the order of the graph, are cut into consecutive parts: whatever the order, a part
needs only earlier ones. Good places are those that few values cross; between a norm and the Linears behind it these are
the residual stream and the norm, beside what is made once for all blocks (cosines, masks)::

    inputs ─ piece 0 ─▶ residual stream, norm ─ piece 1 ─▶ residual stream, gate·up ─ piece 2 ─▶ ...
                └────────── cosines, sines, mask ───────────┴──────────────────────────────┴───▶

A cache that a run puts out is the next run's past, so it must be made no later than in the piece that reads the past.
Where onnxruntime makes one node of several (a Q/DQ pair, a sum and the norm of it, a product and its bias, R3 of the
queries and the scale of the scores), the parts on both sides of a cut would compute with other last digits than the
whole: places before a product or before the rounding of its input are free of that, and are preferred.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import onnx_ir as ir

from quarot_onnx.graph.parts import Parts, constants_behind, nodes_behind
from quarot_onnx.graph.query import attribute_int, data_input, operands
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.graph.tags import is_online
from quarot_onnx.io.halves import HALVES
from quarot_onnx.piecewise.memory import weight_bytes
from quarot_onnx.piecewise.panels import in_panels
from quarot_onnx.piecewise.wide import take_out_weights, wide_name, widen

_PRODUCTS = frozenset({"MatMul", "Gemm", "MatMulNBits"})
_BEFORE = _PRODUCTS | {"QuantizeLinear", "DynamicQuantizeLinear", "Abs"}
_JOINED = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"})
_ELSEWHERE = 8
"""What a place costs, in crossing values, that lies before none of ``_BEFORE``."""

_ROUNDED = 64
"""What a crossing value costs that a Cast of the graph's own made of 16-bit floats, or made them of 32-bit ones.

Whether it is rounded depends on what stands on both sides of the Cast.
"""


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a graph as a model of its own.

    Attributes:
        model: The part; its weights are those of the whole, its outputs those below.
        inputs: Names of what it needs: inputs of the graph and what earlier pieces left.
        weights: What else it takes: weights of 16 bits by the names of the inputs that take them as 32-bit floats.
        outputs: Names of what it leaves: what later pieces or runs need, and outputs that are wanted.
        observed: Names of values that are looked at here.
        read: Names of outputs that later pieces read, in the same run.
        expires: Names of what no piece reads any more once all runs went through.
    """

    model: ir.Model
    inputs: tuple[str, ...]
    weights: Mapping[str, ir.TensorProtocol]
    outputs: tuple[str, ...]
    observed: tuple[str, ...]
    read: frozenset[str]
    expires: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a graph is run for.

    Attributes:
        outputs: Names of outputs.
        observed: Names of values that are looked at.
        pasts: Past inputs, each with the output of the run before that it is.
        fed: Names of inputs with a default that are fed nevertheless; the others are constants.
        wide: Whether weights of float16 are fed as 32-bit floats.
    """

    outputs: Sequence[str] = ()
    observed: Sequence[str] = ()
    pasts: Collection[tuple[str, str]] = ()
    fed: Collection[str] = ()
    wide: bool = False


class Cuts:
    """The pieces of a model; it is not changed and must not be until the last piece was made."""

    def __init__(self, model: ir.Model, wanted: Wanted, limit: int) -> None:
        """Find them.

        Args:
            model: The model, its large weights external.
            wanted: What it is run for.
            limit: Bytes of the weights of a piece, as ``weight_bytes`` counts them; more where one node has more.
        """
        model = in_panels(model, limit, wanted.observed)
        graph = model.graph
        inputs, outputs = {v.name: v for v in graph.inputs}, {v.name: v for v in graph.outputs}
        values = inputs | {v.name: v for node in graph for v in node.outputs}
        self._model = model
        self._asked = dict.fromkeys(outputs[name] for name in wanted.outputs)
        self._observed = dict.fromkeys(values[name] for name in wanted.observed)
        self._pasts = {inputs[past]: outputs[present] for past, present in wanted.pasts}
        self._wide = wanted.wide
        self._ends = dict.fromkeys((*self._asked, *self._pasts.values()))
        self._moving = {v for v in graph.inputs if not v.is_initializer() or v.name in wanted.fed}
        self._made: dict[ir.Value, int] = {}
        self._first: dict[ir.Value, int] = {}
        self._last: dict[ir.Value, int] = {}
        self._nodes = self._label()
        self._parts = Parts(model, self._moving.__contains__)
        self._starts = list(self._choose(limit))

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Piece]:
        """The pieces, in order."""
        return map(self._piece, range(len(self)))

    def _piece(self, number: int) -> Piece:
        start, stop = self._starts[number], self._stop(number)
        nodes = self._nodes[start:stop]
        computed = [v for node in nodes for v in node.outputs]
        later = [v for v in computed if self._last.get(v, -1) >= stop]
        ends = [v for v in computed if v in self._ends]
        if stop == len(self._nodes):
            ends += [v for v in self._ends if v not in self._made]  # what depends on no input
        observed = [v for v in self._observed if start <= self._made.get(v, self._first.get(v, 0)) < stop]
        outputs = [*ends, *later]
        model, inputs, _ = self._parts.part(nodes, outputs, f"piece_{number}", also=observed)
        graph = model.graph
        copies = (*graph.inputs, *graph.outputs)
        for value, copy in zip((*inputs, *outputs), copies, strict=True):
            self._describe(value, copy)
        handed = [copy for value, copy in zip(inputs, graph.inputs, strict=True) if value in self._made]
        left = tuple(graph.outputs[len(ends) :])
        del graph.outputs[len(ends) :]
        read = frozenset(map(wide_name, left))
        widen(graph, handed, left)
        names = tuple(str(v.name) for v in graph.inputs)
        reads = dict(self._last)
        for past, present in self._pasts.items():
            # A past is read as what the run before left, so that goes with the past.
            reads[present] = max(reads.get(present, 0), reads.get(past, 0))
        gone = [v for v, last in reads.items() if start <= last < stop]
        return Piece(
            model,
            names,
            take_out_weights(graph) if self._wide else {},
            tuple(str(v.name) for v in graph.outputs),
            tuple(str(v.name) for v in observed),
            read,
            tuple(name for v in gone for name in dict.fromkeys((str(v.name), wide_name(v)))),
        )

    def _stop(self, number: int) -> int:
        return self._starts[number + 1] if number + 1 < len(self) else len(self._nodes)

    def _label(self) -> list[ir.Node]:
        """The nodes that are run, in order; every value's place among them, and its first and last use."""
        needed = nodes_behind([*self._ends, *self._observed])
        nodes: list[ir.Node] = []
        for node in self._model.graph:
            read = [v for v in operands(node) if v in self._moving]
            if not read:
                continue
            self._moving.update(node.outputs)
            if node not in needed:
                continue
            self._made.update(dict.fromkeys(node.outputs, len(nodes)))
            for value in read:
                self._first.setdefault(value, len(nodes))
                self._last[value] = len(nodes)
            nodes.append(node)
        return nodes

    def _describe(self, value: ir.Value, copy: ir.Value) -> None:
        """Give an end of a piece the type and shape that inference finds where the graph does not say."""
        if copy.type is None and (dtype := self._shapes.dtype(value)) is not None:
            copy.type = ir.TensorType(dtype)
        if copy.shape is None and (shape := self._shapes.of(value)) is not None:
            copy.shape = ir.Shape(shape)

    @cached_property
    def _shapes(self) -> Shapes:
        return Shapes(self._model)

    def _choose(self, limit: int) -> Iterator[int]:
        """Where pieces start."""
        weights = [self._weights(node) for node in self._nodes]
        costs = self._costs([bool(held) for held in weights])
        start: int | None = 0
        while start is not None:
            yield start
            start = _next_start(start, weights, costs, limit)

    def _weights(self, node: ir.Node) -> dict[ir.Value, int]:
        """The bytes of the matrices that a node reads; vectors, as of a norm, are no reason to cut before it."""
        _, found = constants_behind(v for v in operands(node) if v not in self._moving)
        tensors = {value: value.const_value for value in found}
        return {
            v: weight_bytes(tensor) for v, tensor in tensors.items() if tensor is not None and len(tensor.shape) > 1
        }

    def _costs(self, weighty: Sequence[bool]) -> list[int | None]:
        """What it costs to cut before each node; None where that cannot be."""
        count = len(self._nodes)
        crossing, barred = [0] * (count + 1), [0] * (count + 1)

        def between(marks: list[int], made: int, last: int, cost: int = 1) -> None:
            """Mark the places behind one node up to before another."""
            if last > made:
                marks[made + 1] += cost
                marks[last + 1] -= cost

        for value, made in self._made.items():
            last, producer = self._last.get(value, -1), value.producer()
            between(crossing, made, last, _ROUNDED if producer is not None and self._turned(producer) else 1)
            joined = producer is None or producer.op_type in _JOINED or _is_scaled(value)
            if joined or not isinstance(value.type, ir.TensorType | None):
                between(barred, made, last)
        for past, present in self._pasts.items():
            between(barred, self._first.get(past, count), self._made.get(present, -1))
        ends = zip(self._nodes, weighty, accumulate(crossing[:count]), accumulate(barred[:count]), strict=True)
        return [
            None if bars else held + (0 if self._fits_before(node, heavy=heavy) else _ELSEWHERE)
            for node, heavy, held, bars in ends
        ]

    def _fits_before(self, node: ir.Node, *, heavy: bool) -> bool:
        """Whether a place before a node is a good one: a product with a weight, or the rounding of its input."""
        if node.op_type in _PRODUCTS:
            return heavy
        return node.op_type in _BEFORE or self._turned(node) == ir.DataType.FLOAT

    def _turned(self, node: ir.Node) -> ir.DataType | None:
        """What a node makes of 16-bit floats, or makes them of 32-bit ones; None for others."""
        if node.op_type != "Cast":
            return None
        x, to = data_input(node), ir.DataType(attribute_int(node, "to", 0))
        ends = x.dtype or self._shapes.dtype(x), to  # inference where the graph does not say
        return to if ir.DataType.FLOAT in ends and HALVES.intersection(ends) else None


def _is_scaled(value: ir.Value) -> bool:
    """Whether R3 of the queries makes a value, and the scale of the scores, which goes into that product, reads it.

    In 16-bit floats it does not, as onnxruntime has Casts between.
    """
    node, readers = value.producer(), [use.node.op_type for use in value.uses()]
    if node is None or node.op_type not in _PRODUCTS or not is_online(node) or readers not in (["Mul"], ["Div"]):
        return False
    return any(v.const_value is not None and v.const_value.dtype == ir.DataType.FLOAT for v in operands(node))


def _next_start(
    start: int, weights: Sequence[dict[ir.Value, int]], costs: Sequence[int | None], limit: int
) -> int | None:
    """Where the piece ends that begins at ``start``; None for the end of the graph."""
    held: set[ir.Value] = set()
    filled, half, place = 0, None, start
    for place in range(start, len(weights)):
        fresh = weights[place].keys() - held
        more = sum(weights[place][value] for value in fresh)
        if more and filled and filled + more > limit:
            break
        held |= fresh
        filled += more
        if half is None and 2 * filled >= limit:
            half = place + 1
    else:
        return None
    half = half or start + 1
    for places in (range(half, place + 1), range(start + 1, half)):
        allowed = [(cost, -p) for p in places if (cost := costs[p]) is not None]
        if allowed:
            return -min(allowed)[1]
    return next((p for p in range(place + 1, len(costs)) if costs[p] is not None), None)
