"""A graph cut at the inputs of its Linears: stages to be taken one after the other, and the segments between them.

Linears that read one value are a stage (q, k and v; then o; then gate and up; then down). Segment k computes the input
of stage k from what earlier segments left; it runs the Linears of stage k - 1 and nothing that needs a later one::

    inputs ─ segment 0 ─▶ x₀ ─ stage 0, segment 1 ─▶ x₁ ─ stage 1, segment 2 ─▶ x₂ ...
                └──────────── residual stream, cosines, masks: carried ──────────┘

One forward labelling does it: a node's level is that of its latest input, a Linear of stage k has at least level k + 1.
A value that is needed beyond its own level is carried. What depends on no input of the graph is computed anew wherever
it is needed, so that thousands of small constants need not be carried. Names play no part.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from quarot_onnx.graph.linear import Linear
from quarot_onnx.graph.parts import Parts, nodes_behind
from quarot_onnx.graph.query import operands
from quarot_onnx.graph.routing import routed_values


@dataclass(frozen=True, eq=False)
class Stage:
    """Linears that read the same value.

    Attributes:
        input: The value.
        linears: The Linears, in graph order.
        block: The number of the decoder block that they are in.
        routed: The value holds the rows that a router chose for an expert: others in the float model, perhaps.
    """

    input: ir.Value
    linears: tuple[Linear, ...]
    block: int
    routed: bool = False


@dataclass(frozen=True, eq=False)
class Segment:
    """A piece of a graph as a model of its own.

    Attributes:
        model: The piece; its weights are those of the whole.
        inputs: Names of what it needs: inputs of the graph and carried values.
        outputs: Names of what it leaves for later: the next stage's input and values to carry.
        expires: Names of values that nothing needs after this segment.
        nodes: The copies of the Linears' nodes of the stage before, in the order of the stage; None for one that no
            later stage needs (attention's output where the last block is a parallel one).
    """

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    expires: tuple[str, ...]
    nodes: tuple[ir.Node | None, ...]


def find_stages(
    linears: Iterable[Linear],
    starts: Collection[ir.Node],
    kind: Callable[[Linear], object] = lambda linear: linear.transposed_input,
) -> tuple[Stage, ...]:
    """Group Linears into stages.

    Args:
        linears: Linears of one graph, in graph order.
        starts: Nodes of Linears that begin a decoder block.
        kind: Linears of different kinds are never in one stage.

    Returns:
        The stages in an order in which each needs only earlier ones.
    """
    linears = tuple(linears)
    graph = linears[0].node.graph if linears else None
    routed = frozenset() if graph is None else routed_values(graph)
    groups: dict[tuple[ir.Value, object], list[Linear]] = {}
    for linear in linears:
        groups.setdefault((linear.input, kind(linear)), []).append(linear)
    stages: list[Stage] = []
    block = 0
    for (value, _), members in groups.items():
        if stages and any(linear.node in starts for linear in members):
            block += 1
        stages.append(Stage(value, tuple(members), block, value in routed))
    return tuple(stages)


class Segments:
    """The segments of a model, one for each stage."""

    def __init__(self, model: ir.Model, stages: Sequence[Stage], fed: Collection[str] = ()) -> None:
        """Label the graph; it is not changed and must not be until the last segment was made.

        Args:
            model: The model.
            stages: From ``find_stages``.
            fed: Names of inputs with a default that are fed nevertheless; the others are constants here.
        """
        self._model, self._stages, self._fed = model, stages, frozenset(fed)
        self._level: dict[ir.Value, int] = {}
        self._by_level: list[list[ir.Node]] = [[] for _ in stages]
        self._last_use: dict[ir.Value, int] = {}
        self._parts = Parts(model, self._level.__contains__)
        self._label()

    def __len__(self) -> int:
        return len(self._stages)

    def segment(self, number: int) -> Segment:
        """The piece of the graph that computes the input of stage ``number``."""
        nodes, outputs = self._by_level[number], self._left(number)
        model, inputs, copies = self._parts.part(nodes, outputs, f"segment_{number}")
        expired = [v for v, last in self._last_use.items() if last == number]
        return Segment(
            model,
            tuple(str(v.name) for v in inputs),
            tuple(str(v.name) for v in outputs),
            tuple(str(v.name) for v in expired),
            tuple(copies.get(node) for node in self._previous(number)),
        )

    @property
    def origins(self) -> Mapping[str, int]:
        """Which segment leaves a value, by the values' names."""
        return {str(v.name): k for k in range(len(self)) for v in self._left(k)}

    def leaves(self, number: int) -> bool:
        """Whether a segment leaves anything."""
        return bool(self._left(number))

    def outlived(self, number: int) -> set[int]:
        """The segments up to ``number`` of which nothing is needed after it."""
        return {k for k in range(number + 1) if all(self._last_use[v] <= number for v in self._left(k))}

    def _left(self, number: int) -> list[ir.Value]:
        """What a segment leaves for later ones."""
        return [v for node in self._by_level[number] for v in node.outputs if self._last_use.get(v, -1) > number]

    def _previous(self, number: int) -> list[ir.Node]:
        return [linear.node for linear in self._stages[number - 1].linears] if number else []

    def _label(self) -> None:
        """Give every value that depends on an input its level, and every needed one its last use."""
        graph = self._model.graph
        stage_of = {linear.node: k for k, stage in enumerate(self._stages) for linear in stage.linears}
        for value in graph.inputs:
            if not value.is_initializer() or value.name in self._fed:
                self._level[value] = 0
        needed = nodes_behind(stage.input for stage in self._stages)
        for node in graph:
            read = [v for v in operands(node) if v in self._level]
            if not read:
                continue
            level = max(stage_of.get(node, -1) + 1, *(self._level[v] for v in read))
            self._level.update(dict.fromkeys(node.outputs, level))
            if node in needed:
                self._by_level[level].append(node)
                self._last_use.update({v: max(level, self._last_use.get(v, -1)) for v in read})
        for k, stage in enumerate(self._stages):
            # Fetched after segment k, and read by its own Linears in segment k + 1.
            self._last_use[stage.input] = max(k + 1, self._last_use.get(stage.input, -1))
