"""What a rotation changes must not leave the graph: places where it would are left out, with the output's name.

From every value that a rotation changes the graph is followed forward, through whatever reads it, to what undoes the
rotation: the readers (R1), the O Linear (R2), the score product (R3). R4 is undone by the very next node. An output of
the graph on the way holds other values than before, whether it is the value itself, a Cast of it, or a part.

One way out is right: a cache that the same graph takes back. There K and V may be rotated, as long as the past and what
is new are. Whatever else leaves, or comes in without leaving again, belongs to another graph (a prefill graph and its
decode graph, an encoder's cross-attention), which knows nothing of the rotation.
"""

from collections.abc import Collection
from dataclasses import replace
from functools import cached_property

import onnx_ir as ir

from quarot_onnx.graph.caches import Step, forward, presents
from quarot_onnx.graph.query import SIZE_ONLY, data_input, label, through
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.io.nodes import all_nodes
from quarot_onnx.sites.attention import FUSED
from quarot_onnx.sites.model import Attention, Kind, LeftOut, Sites
from quarot_onnx.sites.operands import overlaps
from quarot_onnx.sites.pasts import KEY, VALUE, past_inputs
from quarot_onnx.sites.scores import context_product, score_product

_TOGETHER = "rotate all graphs that share the cache with the same options and split_cache (--split-cache)"


def without_leaks(sites: Sites, model: ir.Model, *, split_cache: bool = False) -> Sites:
    """Leave out what would change an output of the graph in silence.

    Args:
        sites: What was found or named.
        model: Their model.
        split_cache: The other graphs that share its caches are rotated alike, so these may leave and come in.

    Returns:
        The sites; attentions know the output by which a rotated cache leaves.
    """
    if not (sites.norms or sites.attentions):
        return sites
    return _Guard(sites, model, split_cache).run()


class _Guard:
    """The graph's outputs, its caches, and what was left out so far."""

    def __init__(self, sites: Sites, model: ir.Model, split_cache: bool) -> None:
        self._sites, self._model, self._split = sites, model, split_cache
        self._outputs = set(model.graph.outputs)
        self._presents = presents(model.graph)
        self._around = _owners(model.graph)
        self._left_out: list[LeftOut] = []

    def run(self) -> Sites:
        """The sites without those that leak."""
        norms = () if self._stream_leaks() else self._sites.norms
        attentions = tuple(self._heads(self._values(attention)) for attention in self._sites.attentions)
        left_out = (*self._sites.left_out, *self._left_out)
        return replace(self._sites, norms=norms, attentions=attentions, left_out=left_out)

    def _leave_out(self, node: ir.Node, kind: Kind, reason: str) -> None:
        self._left_out.append(LeftOut(label(node), reason, kind))

    @cached_property
    def _shapes(self) -> Shapes:
        return Shapes(self._model)

    def _leaving(self, starts: list[ir.Value], step: Step) -> list[ir.Value]:
        """The outputs of the graph that hold what ``starts`` hold; ``step`` says where that ends."""

        def onward(node: ir.Node, index: int) -> list[ir.Value]:
            out = [] if node.op_type in SIZE_ONLY else step(node, index)
            # What leaves a subgraph is what the node around it puts out.
            return [outer for value in out for outer in (value, *self._around.get(value, ()))]

        return [value for value in forward(starts, onward) if value in self._outputs]

    def _stream_leaks(self) -> bool:
        """R1: from what is written to the residual stream to the readers."""
        sites = self._sites
        readers = {linear.node for site in sites.norms for linear in site.readers}
        norms = {node: site.norm for site in sites.norms for node in site.norm.reads}

        def step(node: ir.Node, index: int) -> list[ir.Value]:
            norm = norms.get(node)
            if node in readers and index == 0:
                return []
            if norm is not None and norm.output in node.outputs:
                return [norm.output, *node.outputs[3:]]  # a Skip-norm's sum, but not 1 / rms, which stays as it is
            if node.op_type == "ReduceMean" and through(data_input(node)).producer() in norms:
                return []  # the mean of squares stays as well
            return list(node.outputs)

        written = [item.node.outputs[0] for item in sites.embeddings]
        written += [item.node.outputs[0] for item in sites.writers]
        found = self._leaving(written, step) if sites.norms else []
        for value in found:
            node = value.producer()
            assert node is not None
            reason = f"what R1 rotates leaves the graph as {value.name!r}, where nothing undoes the rotation"
            self._leave_out(node, Kind.R1, reason)
        return bool(found)

    @cached_property
    def _foreign(self) -> ir.Value | None:
        """A cache that comes in and does not leave: another graph makes it, and caches of this one too."""
        if self._split:
            return None
        for attention in self._sites.attentions:
            for past in (*past_inputs(attention.node, KEY), *past_inputs(attention.node, VALUE)):
                if past not in self._presents:
                    return past
        return None

    def _values(self, attention: Attention) -> Attention:
        """R2 of one attention, or the reason why not."""
        if attention.value is None or attention.output is None:
            return attention
        try:
            return replace(attention, value_cache=self._value_cache(attention))
        except _LeavesError as error:
            self._leave_out(attention.node, Kind.R2, str(error))
            return replace(attention, value=None, value_start=0)

    def _heads(self, attention: Attention) -> Attention:
        """R3 of one attention, or the reason why not."""
        if attention.heads is None:
            return attention
        try:
            return replace(attention, key_cache=self._key_cache(attention))
        except _LeavesError as error:
            self._leave_out(attention.node, Kind.R3, str(error))
            return replace(attention, heads=None)

    def _value_cache(self, attention: Attention) -> str | None:
        """The output by which R2's values leave, if they do."""
        assert attention.value is not None
        assert attention.output is not None
        linear, o = attention.value, attention.output
        product = attention.node if _is_fused(attention.node) else context_product(attention.node.outputs[0])
        whole = attention.value_start == 0 and attention.value_stop == linear.out_features

        def to_product(node: ir.Node, index: int) -> list[ir.Value]:
            if node is product:
                return _present(node, VALUE)
            if not whole and node.op_type in ("Split", "Slice") and through(data_input(node)) is linear.output:
                columns = range(attention.value_start, attention.value_stop)
                return [out for out in node.outputs if overlaps(node, out, columns, self._shapes)]
            return [] if node is o.node and index == 0 else list(node.outputs)

        def to_output(node: ir.Node, index: int) -> list[ir.Value]:
            return [] if node is o.node and index == 0 else list(node.outputs)

        after = [] if product is None else self._leaving([product.outputs[0]], to_output)
        if after:
            raise _LeavesError(f"the attention's result leaves the graph as {_names(after)}, rotated")
        values = self._leaving([linear.node.outputs[0]], to_product)
        return self._cache("V", values, past_inputs(attention.node, VALUE), linear.input)

    def _key_cache(self, attention: Attention) -> str | None:
        """The output by which R3's keys leave, if they do."""
        assert attention.heads is not None
        node, heads = attention.node, attention.heads
        scores = node if _is_fused(node) else score_product(data_input(node))

        def to_scores(user: ir.Node, _: int) -> list[ir.Value]:
            return _present(user, KEY) if user is scores else list(user.outputs)

        def to_product(user: ir.Node, _: int) -> list[ir.Value]:
            return [] if user is scores else list(user.outputs)

        queries = [] if heads.query is None else self._leaving([heads.query], to_product)
        if queries:
            raise _LeavesError(f"Q leaves the graph as {_names(queries)}, rotated")
        keys = self._leaving(_present(node, KEY) if heads.key is None else [heads.key], to_scores)
        source = heads.key or data_input(node, KEY if node.inputs[KEY] is not None else 0)
        return self._cache("K", keys, past_inputs(node, KEY), source)

    def _cache(self, what: str, leaving: list[ir.Value], pasts: list[ir.Value], source: ir.Value) -> str | None:
        """The one cache among the outputs that hold K or V.

        Raises:
            _LeavesError: Something else is among them.
        """
        if self._foreign is not None:
            reason = f"the cache {self._foreign.name!r} comes in and does not leave, so that another graph makes it"
            raise _LeavesError(f"{reason}: {_TOGETHER}")
        read_back: dict[ir.Value, ir.Value] = {}
        other = []
        for value in leaving:
            past = next((past for past, values in self._presents.items() if value in values), None)
            if past is None or past in read_back:  # of two copies one is read back
                other.append(value)
            else:
                read_back[past] = value
        if other and (read_back or len(other) > 1):
            raise _LeavesError(f"{what} leaves the graph as {_names(other)} too, rotated, and not as a cache alone")
        if not other:
            return next((str(read_back[past].name) for past in pasts if past in read_back), None)
        if not self._split:
            reason = f"{what} leaves the graph as {_names(other)}, which comes back by no input of this graph"
            raise _LeavesError(f"{reason}, so that another one reads it: {_TOGETHER}")
        tables = {embedding.node for embedding in self._sites.embeddings}
        if tables and not _depends(source, tables):
            reason = f"{what} leaves the graph as {_names(other)} and comes from another graph (cross-attention)"
            raise _LeavesError(f"{reason}: the graph that reads it has no Linear to rotate")
        return str(other[0].name)


class _LeavesError(Exception):
    """What a rotation changes leaves the graph; carries the reason in the user's words."""


def _is_fused(node: ir.Node) -> bool:
    return (node.domain, node.op_type) in FUSED


def _present(node: ir.Node, which: int) -> list[ir.Value]:
    """The cache that a fused attention puts out."""
    return [node.outputs[which]] if _is_fused(node) and len(node.outputs) > which else []


def _depends(value: ir.Value, nodes: Collection[ir.Node]) -> bool:
    """Whether ``value`` is computed from what one of ``nodes`` puts out."""
    seen, queue = {value}, [value]
    while queue:
        node = queue.pop().producer()
        if node in nodes:
            return True
        fresh = [v for v in (() if node is None else node.inputs) if v is not None and v not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return False


def _owners(graph: ir.Graph) -> dict[ir.Value, tuple[ir.Value, ...]]:
    """For every output of a subgraph, the outputs of the node around it."""
    found: dict[ir.Value, tuple[ir.Value, ...]] = {}
    for node in all_nodes(graph):
        for attribute in node.attributes.values():
            bodies = [attribute.as_graph()] if attribute.type is ir.AttributeType.GRAPH else []
            bodies += attribute.as_graphs() if attribute.type is ir.AttributeType.GRAPHS else []
            found |= {value: tuple(node.outputs) for body in bodies for value in body.outputs}
    return found


def _names(values: Collection[ir.Value]) -> str:
    return " and ".join(repr(value.name) for value in values)
