"""The residual stream: what is written to it, which norms read it, and what stands in the way of R1.

One forward pass labels values. A value is either on the stream (the residual vector itself, up to a scalar
and up to moves that leave the last axis whole) or normed (the output of one of the stream's norms). R1 is
possible when everything that touches a labelled value is understood:

* stream + what Linears (or an embedding) wrote → stream; a norm of the stream → normed;
* normed → Linears only; sizes are never in the way.

Everything else is recorded with the node and the reason.
"""

from dataclasses import dataclass, field

import onnx_ir as ir

from quarot_onnx.graph.linear import Linear, linear_at, linear_producing
from quarot_onnx.graph.query import (
    FLOAT_TYPES,
    PASS_THROUGH,
    attribute_int,
    attribute_ints,
    consumers,
    consumers_through,
    data_input,
    is_op,
    label,
    resolve_constant,
    scalar,
    small_ints,
    through,
)
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.sites.model import Embedding, Norm, ResidualNorm
from quarot_onnx.sites.norms import LAYER_NORMS, SKIP, fused_norm, is_centred_mean, spelt_norms

SIZE_ONLY = frozenset({"Shape", "Size"})
MOVES = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Slice", "Gather", "GatherND", "Expand", "Flatten", "Transpose"})


@dataclass(eq=False)
class Stream:
    """What the labelling found.

    Attributes:
        embeddings: Tables that start the stream.
        norms: Norms of the stream with what is written before them and what reads them, in graph order.
        writers: All Linears that write to the stream.
        problems: (node name, reason) of everything that forbids R1.
        post_norm: Some writer's output is normalised before it is added.
        layer_norm: Some norm subtracts the mean.
        bare_readers: Linears that read the stream without a norm.
        hidden_size: Length of the stream's last axis.
    """

    embeddings: list[Embedding] = field(default_factory=list)
    norms: list[ResidualNorm] = field(default_factory=list)
    writers: list[Linear] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    post_norm: bool = False
    layer_norm: bool = False
    bare_readers: list[Linear] = field(default_factory=list)
    hidden_size: int = 0


def find_stream(graph: ir.Graph, shapes: Shapes) -> Stream:
    """Label the residual stream of a decoder's graph.

    Args:
        graph: The graph, topologically sorted.
        shapes: Inferred shapes.

    Returns:
        The stream; one without writers when the graph has none.
    """
    norms = [*spelt_norms(graph), *(n for n in map(fused_norm, graph) if n is not None)]
    for embedding in _embeddings(graph):
        stream = _Labelling(graph, shapes, norms).run(embedding)
        if stream.writers:
            return stream
    for value in graph.inputs:
        if value.dtype in FLOAT_TYPES and value.shape is not None and len(value.shape) == 3:
            stream = _Labelling(graph, shapes, norms).run(value)
            if stream.writers:
                return stream
    return Stream()


def _embeddings(graph: ir.Graph) -> list[Embedding]:
    """The Gathers of rows from constant float tables."""
    found = []
    for node in graph:
        if node.op_type != "Gather" or attribute_int(node, "axis", 0) != 0 or resolve_constant(node.inputs[1]):
            continue
        table = resolve_constant(node.inputs[0])
        if table is not None and len(table.shape) == 2 and table.dtype in FLOAT_TYPES:
            found.append(Embedding(node, table))
    return found


@dataclass(eq=False)
class _Normed:
    """The label of a norm's output; ``flipped`` after a 2-D Transpose (for a Gemm with transA)."""

    readers: list[Linear]
    flipped: bool = False


class _Labelling:
    """The forward pass: one small method for each way in which a labelled value is used."""

    def __init__(self, graph: ir.Graph, shapes: Shapes, norms: list[Norm]) -> None:
        self._graph = graph
        self._shapes = shapes
        self._by_read = {node: norm for norm in norms for node in norm.reads}
        self._norm_by_output = {norm.output: norm for norm in norms}
        self._inner: set[ir.Node] = set()
        self._stream: set[ir.Value] = set()
        self._normed: dict[ir.Value, _Normed] = {}
        self._pending: list[Embedding | Linear] = []
        self._last_written: tuple[Embedding | Linear, ...] = ()
        self._groups: list[tuple[tuple[Embedding | Linear, ...], Norm, list[Linear]]] = []
        self._found = Stream()

    def run(self, start: Embedding | ir.Value) -> Stream:
        """Label from one starting point to the end of the graph."""
        if isinstance(start, Embedding):
            self._found.embeddings.append(start)
            self._found.hidden_size = start.table.shape[1]
            self._pending.append(start)
            self._stream.add(start.node.outputs[0])
        else:
            self._found.hidden_size = self._shapes.last(start) or 0
            self._stream.add(start)
            self._problem_text(str(start.name), "the graph takes embedded tokens: there is no embedding to rotate")
        for node in self._graph:
            self._visit(node)
        for value in (*self._stream, *self._normed):
            if value.is_graph_output():
                self._problem_text(str(value.name), "the residual stream itself is an output of the graph")
        self._found.norms = [ResidualNorm(previous, norm, tuple(rs)) for previous, norm, rs in self._groups]
        return self._found

    def _visit(self, node: ir.Node) -> None:
        """Treat one node; nodes that touch no labelled value are passed over."""
        touched = [v for v in node.inputs if v is not None and (v in self._stream or v in self._normed)]
        if not touched or node.op_type in SIZE_ONLY or node in self._inner:
            return
        norm = self._by_read.get(node)
        if norm is not None and touched[0] in self._stream:
            self._norm(node, norm)
        elif node.op_type in PASS_THROUGH or self._is_scaling(node) or self._is_move(node):
            self._carry(touched[0], node.outputs[0], flipped=False)
        elif touched[0] in self._normed:
            self._read(node, touched[0], self._normed[touched[0]])
        elif node.op_type in ("Add", "Sum"):
            self._write(node, [v for v in node.inputs if v is not None and v not in self._stream])
            self._stream.add(node.outputs[0])
        else:
            self._unknown_reader(node)

    def _carry(self, source: ir.Value, target: ir.Value, *, flipped: bool) -> None:
        """Give ``target`` the label of ``source``."""
        if source in self._stream:
            self._stream.add(target)
        else:
            mark = self._normed[source]
            self._normed[target] = _Normed(mark.readers, mark.flipped != flipped)

    def _norm(self, node: ir.Node, norm: Norm) -> None:
        """A norm of the stream; a Skip-norm also writes."""
        if node.op_type == SKIP:
            self._write(node, [v for v in node.inputs[:2] if v is not None and v not in self._stream])
            if norm.skip_sum is not None:
                self._stream.add(norm.skip_sum)
        self._inner |= norm.reads
        if self._pending:
            self._last_written = tuple(self._pending)
            self._pending = []
        readers: list[Linear] = []
        self._groups.append((self._last_written, norm, readers))
        self._normed[norm.output] = _Normed(readers)
        if norm.gamma is not None and norm.gamma.shape[-1] != self._found.hidden_size:
            self._problem(node, f"its weight has {norm.gamma.shape[-1]} entries, not {self._found.hidden_size}")

    def _read(self, node: ir.Node, value: ir.Value, mark: _Normed) -> None:
        """A use of a norm's output: a Linear, or something that R1 cannot pass."""
        if is_op(node, "Transpose") and attribute_ints(node, "perm") in (None, (1, 0)):
            self._carry(value, node.outputs[0], flipped=True)
            return
        linear = linear_at(node)
        if linear is not None and linear.input is value and linear.transposed_input == mark.flipped:
            mark.readers.append(linear)
        else:
            self._problem(node, "reads a norm of the residual stream but is no Linear with a constant weight")

    def _unknown_reader(self, node: ir.Node) -> None:
        """Something other than a norm or an addition reads the stream."""
        linear = linear_at(node)
        if linear is not None:
            self._found.bare_readers.append(linear)
            self._problem(node, "reads the residual stream without a norm before it (post-norm block)")
        elif node.op_type in LAYER_NORMS or is_centred_mean(node):
            self._found.layer_norm = True
            self._problem(node, "is a LayerNorm: it subtracts the mean, so R1 does not pass it (an RMSNorm does)")
        elif not self._belongs_to_layer_norm(node):
            self._problem(node, "reads the residual stream but is neither an RMSNorm nor an addition to it")

    def _belongs_to_layer_norm(self, node: ir.Node) -> bool:
        """Whether ``node`` is the x - mean(x) of a LayerNorm, which is reported at its ReduceMean."""
        return is_op(node, "Sub") and any(
            is_op(v.producer(), "ReduceMean") for v in map(through, filter(None, node.inputs)) if v is not None
        )

    def _write(self, node: ir.Node, values: list[ir.Value]) -> None:
        """Record what the addition ``node`` adds to the stream."""
        for value in values:
            self._trace_writer(node, value)

    def _trace_writer(self, add: ir.Node, value: ir.Value) -> None:
        """Follow an addend back to the Linears (or the table) that made it."""
        value = through(value)
        linear = linear_producing(value)
        node = value.producer()
        norm = self._norm_by_output.get(value)
        if linear is not None:
            self._written(add, linear)
        elif norm is not None and not resolve_constant(norm.input):
            self._found.post_norm = True
            self._problem(norm.node, "normalises a block's output before it is added (post-norm block)")
            self._trace_writer(add, norm.input)
        elif node is not None and (self._is_scaling(node) or self._is_move(node)):
            self._trace_writer(add, next(v for v in node.inputs if v is not None and not resolve_constant(v)))
        elif node is not None and node.op_type == "Add":
            for operand in node.inputs:
                self._trace_writer(add, data_input(node) if operand is None else operand)
        elif node is not None and (table := next((e for e in _embeddings_of(node)), None)):
            self._found.embeddings.append(table)
            self._pending.append(table)
        else:
            origin = label(node) if node is not None else value.name
            self._problem(add, f"adds to the residual stream what {origin} computes, which is no Linear")

    def _written(self, add: ir.Node, linear: Linear) -> None:
        """Record one writer; its output must have no other use."""
        self._pending.append(linear)
        self._found.writers.append(linear)
        others = [user for user, _ in consumers_through(linear.output) if user.op_type not in SIZE_ONLY]
        if len(others) > 1 or linear.output.is_graph_output():
            self._problem(linear.node, "writes to the residual stream and is used elsewhere too")
        if linear.out_features != self._found.hidden_size:
            self._problem(add, f"adds {linear.out_features} values to a stream of {self._found.hidden_size}")

    def _is_scaling(self, node: ir.Node) -> bool:
        """A product with, or a quotient by, one number."""
        if node.op_type == "Mul":
            return any(scalar(v) is not None for v in node.inputs)
        return node.op_type == "Div" and scalar(node.inputs[1]) is not None

    def _is_move(self, node: ir.Node) -> bool:
        """A change of layout that leaves the last axis whole and last."""
        if node.op_type not in MOVES:
            return False
        value, out = data_input(node), node.outputs[0]
        width = self._found.hidden_size
        if node.op_type == "Transpose":
            perm = attribute_ints(node, "perm")
            return perm is not None and perm[-1] == len(perm) - 1
        if node.op_type == "Slice" and len(node.inputs) > 3:
            axes = small_ints(node.inputs[3])
            rank = self._shapes.rank(value)
            return axes is not None and all(a != -1 and (rank is None or a != rank - 1) for a in axes)
        if node.op_type == "Reshape":
            target = small_ints(node.inputs[1])
            if target is not None and target[-1] == width:
                return True
        return self._shapes.last(value) == width and self._shapes.last(out) == width

    def _problem(self, node: ir.Node, reason: str) -> None:
        self._problem_text(label(node), reason)

    def _problem_text(self, name: str, reason: str) -> None:
        if (name, reason) not in self._found.problems:
            self._found.problems.append((name, reason))


def _embeddings_of(node: ir.Node) -> list[Embedding]:
    """The embedding that ``node`` is, as a list of none or one."""
    if node.op_type != "Gather" or attribute_int(node, "axis", 0) != 0:
        return []
    table = resolve_constant(node.inputs[0])
    return [Embedding(node, table)] if table is not None and len(table.shape) == 2 else []


def only_use(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The only user of ``value`` apart from Shape and Size, if it is one of ``op_types``."""
    users = [node for node, _ in consumers(value) if node.op_type not in SIZE_ONLY]
    return users[0] if len(users) == 1 and users[0].op_type in op_types else None
