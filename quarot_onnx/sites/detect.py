"""From a graph to its :class:`~quarot_onnx.sites.model.Sites`, by structure alone.

No name of a node, a value or a file takes part: the same graph with every name replaced gives the same sites.
What is not understood is left out with the node and the reason; nothing is guessed.
"""

from functools import cached_property

import onnx_ir as ir

from quarot_onnx.errors import ModelError
from quarot_onnx.graph.caches import forward
from quarot_onnx.graph.linear import Linear, is_matmul, linear_at, linears
from quarot_onnx.graph.query import SIZE_ONLY, label
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.io.nodes import all_nodes, subgraphs
from quarot_onnx.sites.attention import find_attentions
from quarot_onnx.sites.leaving import without_leaks
from quarot_onnx.sites.model import Attention, Kind, LeftOut, Sites
from quarot_onnx.sites.norms import fused_norm, spelt_norms
from quarot_onnx.sites.stream import Stream, find_stream
from quarot_onnx.sites.unknown import unknown_attentions
from quarot_onnx.sites.unwritten import unwritten_downs

QUANTIZED = frozenset(
    {
        "DequantizeLinear",
        "QuantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "QLinearMatMul",
        "MatMulNBits",
        "MatMulBnb4",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "QGemm",
        "GatherBlockQuantized",
    }
)


def is_quantized(graph: ir.Graph) -> bool:
    """Whether a graph carries quantized operators."""
    return any(node.op_type in QUANTIZED for node in graph)


def refuse_quantized(graph: ir.Graph) -> None:
    """Refuse a graph that already carries quantized operators.

    Raises:
        ModelError: Naming the first such node.
    """
    for node in graph:
        if node.op_type in QUANTIZED:
            raise ModelError(
                f"the graph is already quantized: node {label(node)!r} is a {node.op_type}; "
                "start from the float32 or float16 export"
            )


def refuse_hidden(graph: ir.Graph) -> None:
    """Refuse a graph whose decoder is hidden in the branches of an If or the body of a Loop.

    Raises:
        ModelError: Naming the node.
    """
    for node in graph:
        if inner_linears(node):
            raise ModelError(
                f"the decoder is inside the {node.op_type} node {label(node)!r}; "
                "export without merging the decoders (optimum: --no-post-process)"
            )


def inner_linears(node: ir.Node) -> list[Linear]:
    """The Linears in the branches of an If or the body of a Loop; an outer product is none (LongRoPE's angles)."""
    inside = (linear_at(inner) for body in subgraphs(node) for inner in all_nodes(body))
    return [linear for linear in inside if linear is not None and linear.in_features > 1]


def detect(model: ir.Model, *, split_cache: bool = False) -> Sites:
    """Find everything that can be rotated.

    Args:
        model: A float decoder, as exported; its weights are not read.
        split_cache: The other graphs that share its caches are rotated alike.

    Returns:
        The sites; ``sites.layers`` is 0 when the graph is not a decoder.

    Raises:
        ModelError: The graph is already quantized, or its decoder is out of sight.
    """
    return Survey(model).rotatable(split_cache=split_cache)


class Survey:
    """A model and what is found in it, looked at once for all who ask; to be made anew once the graph is changed.

    Attributes:
        model: The model.
    """

    def __init__(self, model: ir.Model) -> None:
        """Look at nothing yet."""
        self.model = model

    @cached_property
    def shapes(self) -> Shapes:
        """The shapes of the graph's values."""
        return Shapes(self.model)

    @cached_property
    def sites(self) -> Sites:
        """As from ``understood``.

        Raises:
            ModelError: The graph is already quantized.
        """
        return understood(self.model, self.shapes)

    def visible(self) -> Sites:
        """The sites of a graph that hides no decoder.

        Raises:
            ModelError: The graph is already quantized, or its decoder is out of sight.
        """
        if not self.sites.layers:
            refuse_hidden(self.model.graph)
        return self.sites

    def rotatable(self, *, split_cache: bool = False) -> Sites:
        """As from ``detect``.

        Raises:
            ModelError: The graph is already quantized, or its decoder is out of sight.
        """
        return without_leaks(self.visible(), self.model, split_cache=split_cache)


def understood(model: ir.Model, shapes: Shapes) -> Sites:
    """Everything whose structure admits a rotation, whatever leaves the graph; little or nothing where a decoder hides.

    Args:
        model: As for ``detect``.
        shapes: Of its graph.

    Returns:
        The sites; ``sites.layers`` is 0 when the graph is not a decoder, or its decoder is out of sight.

    Raises:
        ModelError: The graph is already quantized.
    """
    graph = model.graph
    refuse_quantized(graph)
    stream = find_stream(graph, shapes)
    attentions, left_out = find_attentions(graph, shapes)
    if not attentions:
        attentions, left_out = unknown_attentions(stream)
    attentions, others = _of_stream(attentions, stream)
    left_out.extend(others)
    writers = {linear.node for linear in stream.writers}
    outputs = {a.output.node for a in attentions if a.output is not None}
    untraced = {a.node for a in attentions if a.output is None or a.output.node not in writers}
    mlps = tuple(
        linear
        for linear in stream.writers
        if linear.node not in outputs and not _follows(linear, untraced, stream.values)
    )
    left_out.extend(LeftOut(name, reason, Kind.R1) for name, reason in stream.problems)
    if attentions and stream.writers:
        left_out.extend(unwritten_downs(graph, stream, outputs))
    head = _head(graph, stream)
    tables = {embedding.table.value for embedding in stream.embeddings}
    return Sites(
        embeddings=tuple(stream.embeddings),
        norms=() if stream.problems else tuple(stream.norms),
        writers=tuple(stream.writers),
        attentions=tuple(attentions),
        mlps=mlps if attentions else (),
        head=head,
        layers=len(attentions),
        hidden_size=stream.hidden_size if stream.writers else 0,
        tied=any(linear.weight.value in tables for linear in head),
        architecture=_architecture(graph, stream, attentions, mlps),
        left_out=tuple(left_out),
    )


def _of_stream(attentions: list[Attention], stream: Stream) -> tuple[list[Attention], list[LeftOut]]:
    """The attentions of the decoder whose stream this is, and why R2 and R3 do not go to others, such as an encoder's.

    Where its output Linear is not seen to write to the stream (behind a LayerNorm, before a scaling that is not
    understood), an attention is the decoder's, too: of R1 to R4, caches and prefixes R1 alone needs the stream.
    """
    writers = {linear.node for linear in stream.writers}
    reached = set(forward(list(stream.values), _computed)) if writers else set[ir.Value]()
    own = [a for a in attentions if a.output is None or a.output.node in writers or a.node.outputs[0] in reached]
    reason = "it works on nothing of the residual stream that was found, as an encoder's attention does"
    others = [a for a in attentions if a not in own] if writers else []
    return own, [LeftOut(a.name, reason, kind) for a in others for kind in (Kind.R2, Kind.R3)]


def _computed(node: ir.Node, _: int) -> list[ir.Value]:
    """What a node makes of what its inputs hold."""
    return [] if node.op_type in SIZE_ONLY else list(node.outputs)


def _head(graph: ir.Graph, stream: Stream) -> tuple[Linear, ...]:
    """The Linears behind the last norm; where norms are not followed (LayerNorm), those that make the logits.

    They are as wide as one of the tables is long, and no other Linear follows, nor an attention: a table of positions
    may be as long as the residual stream is wide (GPT-2 medium).
    """
    if stream.norms and not stream.layer_norm:
        return stream.norms[-1].readers
    vocabularies = {embedding.table.shape[0] for embedding in stream.embeddings}
    wide = [linear for linear in linears(graph) if linear.out_features in vocabularies]
    return tuple(linear for linear in wide if _is_put_out(linear))


def _is_put_out(linear: Linear) -> bool:
    """Whether an output of the graph holds what a Linear makes, entry by entry."""

    def onward(node: ir.Node, _: int) -> list[ir.Value]:
        ends = node.op_type in SIZE_ONLY or is_matmul(node) or linear_at(node) is not None
        return [] if ends else list(node.outputs)

    shapes = [value.shape for value in forward([linear.output], onward) if value.is_graph_output()]
    return any(not shape or shape[-1] == linear.out_features or not isinstance(shape[-1], int) for shape in shapes)


def _follows(linear: Linear, attentions: set[ir.Node], stop: set[ir.Value]) -> bool:
    """Whether a Linear works on what one of ``attentions`` computes, on a way past no node that reads ``stop``."""
    seen: set[ir.Value] = set()
    frontier = [linear.input] if attentions else []
    while frontier:
        value = frontier.pop()
        node = value.producer()
        if node in attentions:
            return True
        if node is not None and value not in seen and not any(v in stop for v in (value, *node.inputs)):
            seen.add(value)
            frontier.extend(v for v in node.inputs if v is not None)
    return False


def _architecture(graph: ir.Graph, stream: Stream, attentions: list[Attention], mlps: tuple[Linear, ...]) -> str:
    """The family whose structure this is; only for people to read."""
    if not attentions or not stream.writers:
        return "not a decoder"
    if stream.layer_norm or stream.post_norm:
        post_norm = "olmo2" if stream.bare_readers else "gemma3"
        return "decoder with LayerNorm" if stream.layer_norm else post_norm
    return _pre_norm_architecture(graph, stream, attentions, mlps)


def _pre_norm_architecture(
    graph: ir.Graph, stream: Stream, attentions: list[Attention], mlps: tuple[Linear, ...]
) -> str:
    """The family of a decoder with RMSNorms before its blocks."""
    head_dim = attentions[0].head_dim
    norms = (*spelt_norms(graph), *filter(None, map(fused_norm, graph)))
    if any(n.gamma is not None and n.gamma.shape[-1] == head_dim != stream.hidden_size for n in norms):
        return "qwen3"
    first = attentions[0].value
    if first is not None and first.bias is not None:
        return "qwen2"
    reads_gate_up = [ln for group in stream.norms[:2] for ln in group.readers]
    if mlps and any(ln.out_features == 2 * mlps[0].in_features for ln in reads_gate_up):
        return "phi3"
    return "llama"
