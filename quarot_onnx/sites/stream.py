"""The residual stream: what is written to it, which norms read it, and what stands in the way of R1.

One forward pass labels values. A value is either on the stream (the residual vector itself, up to a scalar
and up to moves that leave the last axis whole) or normed (the output of one of the stream's norms). R1 is
possible when everything that touches a labelled value is understood:

* stream + what Linears (or an embedding) wrote → stream; a norm of the stream → normed;
* normed → Linears only; what looks at the shape alone is never in the way.

Everything else is recorded with the node and the reason.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from quarot_onnx.graph.linear import Linear, linear_at, linear_producing
from quarot_onnx.graph.query import (
    FLOAT_TYPES,
    SIZE_ONLY,
    attribute_int,
    attribute_ints,
    consumers,
    data_users,
    label,
    passes,
    resolve_constant,
    through,
)
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.sites.model import Embedding, Norm, ResidualNorm
from quarot_onnx.sites.moves import channels_scaled, moved_operand, scaled_operand
from quarot_onnx.sites.norms import LAYER_NORMS, SKIP_SUM, SKIPS, fused_norm, is_centred_mean, is_centring, spelt_norms


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
        values: All values on the stream.
    """

    embeddings: list[Embedding] = field(default_factory=list)
    norms: list[ResidualNorm] = field(default_factory=list)
    writers: list[Linear] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    post_norm: bool = False
    layer_norm: bool = False
    bare_readers: list[Linear] = field(default_factory=list)
    hidden_size: int = 0
    values: set[ir.Value] = field(default_factory=set)


def find_stream(graph: ir.Graph, shapes: Shapes) -> Stream:
    """Label the residual stream of a decoder's graph.

    Args:
        graph: The graph, topologically sorted.
        shapes: Inferred shapes.

    Returns:
        The stream; one without writers when the graph has none.
    """
    norms = [*spelt_norms(graph, shapes), *(n for node in graph if (n := fused_norm(node, shapes)) is not None)]
    for embedding in filter(None, map(_embedding_at, graph)):
        labelling = _Labelling(graph, shapes, norms)
        stream = labelling.run(embedding)
        if stream.writers:
            return stream
        for norm in labelling.first_norms:
            behind = _Labelling(graph, shapes, norms).run(norm, stream.embeddings)
            if behind.writers:
                return behind
    for value in graph.inputs:
        if value.dtype in FLOAT_TYPES and value.shape is not None and len(value.shape) == 3:
            stream = _Labelling(graph, shapes, norms).run(value)
            if stream.writers:
                return stream
    return Stream()


def _embedding_at(node: ir.Node) -> Embedding | None:
    """The embedding that ``node`` is, a Gather of rows from a constant float table, or None."""
    if node.op_type != "Gather" or attribute_int(node, "axis", 0) != 0 or resolve_constant(node.inputs[1]):
        return None
    table = resolve_constant(node.inputs[0])
    found = table is not None and len(table.shape) == 2 and table.dtype in FLOAT_TYPES
    return Embedding(node, table) if table is not None and found else None


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
        self._by_read: dict[ir.Node, list[Norm]] = defaultdict(list)
        for norm in norms:
            for node in norm.reads:
                self._by_read[node].append(norm)
        self._norm_by_output = {norm.output: norm for norm in norms}
        self._inner: set[ir.Node] = set()
        self._stream: set[ir.Value] = set()
        self._normed: dict[ir.Value, _Normed] = {}
        self._pending: list[Embedding | Linear] = []
        self._normed_inside: set[ir.Value] = set()
        self._last_written: tuple[Embedding | Linear, ...] = ()
        self._groups: list[tuple[tuple[Embedding | Linear, ...], Norm, list[Linear]]] = []
        self._found = Stream()
        self.first_norms: list[ir.Value] = []

    def run(self, start: Embedding | ir.Value, tables: Sequence[Embedding] = ()) -> Stream:
        """Label from a table, an input, or a norm of ``tables``; ``first_norms`` are then those of this stream."""
        if isinstance(start, Embedding):
            self._found.embeddings.append(start)
            self._found.hidden_size = start.table.shape[1]
            self._pending.append(start)
            self._stream.add(start.node.outputs[0])
        elif tables:
            self._found.embeddings.extend(tables)
            self._found.hidden_size = tables[0].table.shape[1]
            self._stream.add(start)
            self._problem_text(str(start.name), "is normed right behind the embedding: no table holds it to be rotated")
        else:
            self._found.hidden_size = self._shapes.last(start) or 0
            self._stream.add(start)
            self._problem_text(str(start.name), "the graph takes embedded tokens: there is no embedding to rotate")
        for node in self._graph:
            self._visit(node)
        for value in (*self._stream, *self._normed):
            what = "the residual stream" if value in self._stream else "a norm of the residual stream"
            if value.is_graph_output():
                self._problem_text(str(value.name), f"{what} is itself an output of the graph")
            for user, _ in consumers(value):
                if user.graph is not self._graph:
                    self._problem(user, f"reads {what} inside a subgraph")
        self._found.values = self._stream
        self._found.norms = [ResidualNorm(previous, norm, tuple(rs)) for previous, norm, rs in self._groups]
        return self._found

    def _visit(self, node: ir.Node) -> None:
        """Treat one node; nodes that touch no labelled value are passed over."""
        touched = [v for v in node.inputs if v is not None and (v in self._stream or v in self._normed)]
        if not touched or node.op_type in SIZE_ONLY or node in self._inner:
            return
        norms = self._by_read.get(node)
        if norms and touched[0] in self._stream:
            self._norms(node, norms)
        elif len(touched) == 1 and (passes(node) or self._vector(node) is touched[0]):
            self._carry(touched[0], node.outputs[0], flipped=False)
        elif touched[0] in self._normed:
            self._read(node, touched[0], self._normed[touched[0]])
        elif node.op_type in ("Add", "Sum"):
            self._write(node, [v for v in node.inputs if v is not None and v not in self._stream])
            self._stream.add(node.outputs[0])
        else:
            if node.op_type in SKIPS:
                self._skip(node)
            self._unknown_reader(node)

    def _vector(self, node: ir.Node) -> ir.Value | None:
        """The operand that a scaling or a change of layout passes on."""
        return scaled_operand(node, self._shapes) or moved_operand(node, self._found.hidden_size, self._shapes)

    def _carry(self, source: ir.Value, target: ir.Value, *, flipped: bool) -> None:
        """Give ``target`` the label of ``source``."""
        if source in self._stream:
            self._stream.add(target)
        else:
            mark = self._normed[source]
            self._normed[target] = _Normed(mark.readers, mark.flipped != flipped)

    def _norms(self, node: ir.Node, norms: list[Norm]) -> None:
        """A norm of the stream, or several that differ in γ alone; a Skip-norm also writes."""
        if node.op_type in SKIPS:
            self._skip(node)
        if self._pending:
            self._last_written = tuple(self._pending)
            self._pending = []
        for norm in norms:
            self._inner |= norm.reads
            readers: list[Linear] = []
            self._groups.append((self._last_written, norm, readers))
            self.first_norms.append(norm.output)
            self._normed[norm.output] = _Normed(readers)
            if norm.gamma is not None and norm.gamma.shape != (self._found.hidden_size,):
                shape = list(norm.gamma.shape)
                self._problem(node, f"its weight has the shape {shape}, not [{self._found.hidden_size}]")

    def _skip(self, node: ir.Node) -> None:
        """The addition inside a Skip-norm; its last output carries the sum on."""
        self._write(node, [v for v in node.inputs[:2] if v is not None and v not in self._stream])
        if len(node.outputs) > SKIP_SUM and node.outputs[SKIP_SUM].name:
            self._stream.add(node.outputs[SKIP_SUM])

    def _read(self, node: ir.Node, value: ir.Value, mark: _Normed) -> None:
        """A use of a norm's output: a Linear, or something that R1 cannot pass."""
        if node.op_type == "Transpose" and attribute_ints(node, "perm") in (None, (1, 0)):
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
            self.first_norms.extend(node.outputs[:1] if node.op_type in LAYER_NORMS else ())
            self._problem(node, "is a LayerNorm: it subtracts the mean, so R1 does not pass it (an RMSNorm does)")
        elif node.op_type in SKIPS:
            self._problem(node, "is a Skip-norm with a bias, or with a weight that is no constant vector")
        elif not is_centring(node):
            self._problem(node, "reads the residual stream but is neither an RMSNorm nor an addition to it")

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
        self._refuse_other_uses(value)
        if linear is not None:
            self._written(add, linear)
        elif norm is not None:
            self._found.post_norm = True
            self._problem(norm.node, "normalises a block's output before it is added (post-norm block)")
            self._normed_inside.add(norm.input)
            self._trace_writer(add, norm.input)
        elif node is not None and (table := _embedding_at(node)) is not None:
            if all(node is not embedding.node for embedding in self._found.embeddings):
                self._found.embeddings.append(table)
                self._pending.append(table)
        elif node is not None and (vector := self._vector(node)) is not None:
            self._trace_writer(add, vector)
        elif node is not None and (scaled := channels_scaled(node)) is not None:
            self._problem(node, "scales what is added to the residual stream channel by channel (LayerScale)")
            self._trace_writer(add, scaled)
        elif node is not None and node.op_type == "Add":
            for operand in filter(None, node.inputs):
                self._trace_writer(add, operand)
        else:
            origin = label(node) if node is not None else value.name
            self._problem(add, f"adds to the residual stream what {origin} holds, which no Linear computes")

    def _refuse_other_uses(self, value: ir.Value) -> None:
        """What is added to the stream must not be used elsewhere: it will be rotated."""
        users = {user for user, _ in data_users(value)}
        node = value.producer()
        if node is not None and value not in self._normed_inside and (len(users) > 1 or value.is_graph_output()):
            self._problem(node, "writes to the residual stream and is used elsewhere too")

    def _written(self, add: ir.Node, linear: Linear) -> None:
        """Record one writer; once, however often it is added."""
        if any(linear.node is writer.node for writer in self._found.writers):
            return
        self._pending.append(linear)
        self._found.writers.append(linear)
        if linear.out_features != self._found.hidden_size:
            self._problem(add, f"adds {linear.out_features} values to a stream of {self._found.hidden_size}")
        if linear.bias_is_spread:
            self._problem(linear.node, "adds one number to all of its outputs, which cannot be rotated")

    def _problem(self, node: ir.Node, reason: str) -> None:
        self._problem_text(label(node), reason)

    def _problem_text(self, name: str, reason: str) -> None:
        if (name, reason) not in self._found.problems:
            self._found.problems.append((name, reason))
