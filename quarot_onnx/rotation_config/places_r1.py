"""R1 by name: pairs of what is written before a norm and what reads it, checked against the graph.

R1 rotates the residual stream itself, so it goes everywhere or nowhere: where detection understands the stream,
a file that leaves a writer, a norm or a reader out, or names one in the wrong place, is refused. Where detection
does not, the file is followed, with the sizes checked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import onnx_ir as ir

from quarot_onnx.errors import ConfigError
from quarot_onnx.graph.linear import LINEAR_OPS, Linear
from quarot_onnx.graph.query import FLOAT_TYPES, attribute_int, resolve_constant
from quarot_onnx.rotation_config.names import Names, Ref, once
from quarot_onnx.rotation_config.statements import R1Places
from quarot_onnx.sites.model import Embedding, Kind, Norm, ResidualNorm, Sites
from quarot_onnx.sites.norms import fused_norm, spelt_norms

_T = TypeVar("_T", Embedding | Linear, Linear)

_SHOWN = 5
"""So many disagreements are listed."""

_Item = Embedding | Linear

_RESHAPING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Cast"})


@dataclass(frozen=True)
class NamedPair:
    """One R1 site by name.

    Attributes:
        previous: The embedding, or the Linears whose outputs are added to the stream before the norm.
        norm: Any node of the norm; None: whatever norm the readers read.
        readers: The Linears that read the norm.
    """

    previous: tuple[Ref, ...]
    norm: Ref | None
    readers: tuple[Ref, ...]


def r1_places(key: str, pairs: list[NamedPair], graph: ir.Graph, names: Names, found: Sites) -> R1Places:
    """Resolve the pairs of a file.

    Args:
        key: The file's key for the pairs, for messages.
        pairs: The pairs.
        graph: The graph.
        names: Its names.
        found: What detection found in it.

    Raises:
        ConfigError: A node is missing, named twice, not what its place asks for, or has the wrong size; or the
            pairs do not cover the residual stream. All disagreements are listed, up to five.
    """
    resolver = _Resolver(graph, names, found)
    given = [resolver.site(pair) for pair in pairs]
    once(resolver.named)
    if not found.norms:
        return R1Places(tuple(given), _common_size(pairs, given))
    wrong = [*_omissions(given, found), *_misplacements(given, found)]
    if wrong:
        more = f" (and {len(wrong) - _SHOWN} more)" if len(wrong) > _SHOWN else ""
        raise ConfigError(f"{key} {'; '.join(wrong[:_SHOWN])}{more}; R1 must cover the whole residual stream")
    return R1Places(found.norms, found.hidden_size)


class _Resolver:
    """Names to embeddings, norms and Linears."""

    def __init__(self, graph: ir.Graph, names: Names, found: Sites) -> None:
        norms = {norm.node: norm for norm in (*spelt_norms(graph), *filter(None, map(fused_norm, graph)))}
        norms |= {site.norm.node: site.norm for site in found.norms}
        self._names = names
        self._norm_by_node = {node: norm for norm in norms.values() for node in _nodes(norm)}
        self._norm_by_output = {norm.output: norm for norm in norms.values()}
        self._norm_by_reader = {linear.node: site.norm for site in found.norms for linear in site.readers}
        self.named: list[tuple[Ref, ir.Node]] = []

    def site(self, pair: NamedPair) -> ResidualNorm:
        """One pair."""
        previous = tuple(self._noted(ref, self._previous(ref)) for ref in pair.previous)
        readers = tuple(self._noted(ref, self._names.linear(ref)) for ref in pair.readers)
        norm = self._between(pair.readers, readers) if pair.norm is None else self._norm(pair.norm)
        self.named.append((pair.norm or Ref(f"{pair.readers[0].place} (its norm)", norm.name), norm.node))
        return ResidualNorm(previous, norm, readers)

    def _noted(self, ref: Ref, item: _T) -> _T:
        self.named.append((ref, item.node))
        return item

    def _previous(self, ref: Ref) -> Embedding | Linear:
        node = self._names.find(ref, LINEAR_OPS | {"Gather"})
        if node.op_type != "Gather":
            return self._names.linear(ref)
        table = resolve_constant(node.inputs[0])
        if table is None or len(table.shape) != 2 or table.dtype not in FLOAT_TYPES:
            reason = "it does not gather from a constant float table [rows, hidden]"
        elif attribute_int(node, "axis", 0) != 0:
            reason = f"it gathers along axis {attribute_int(node, 'axis', 0)}, not rows"
        else:
            return Embedding(node, table)
        raise ConfigError(f"{ref.place}: Gather {ref.name!r} is no embedding: {reason}")

    def _norm(self, ref: Ref) -> Norm:
        node = self._names.find(ref, {node.op_type for node in self._norm_by_node})
        norm = self._norm_by_node.get(node)
        if norm is None:
            raise ConfigError(f"{ref.place}: node {ref.name!r} ({node.op_type}) is no part of an RMSNorm")
        return norm

    def _between(self, refs: tuple[Ref, ...], readers: tuple[Linear, ...]) -> Norm:
        """The norm that the readers of a pair without one read."""
        shared: Norm | None = None
        for ref, linear in zip(refs, readers, strict=True):
            norm = self._read_by(linear)
            if norm is None:
                raise ConfigError(f"{ref.place}: {ref.name!r} reads no RMSNorm, so the pair's norm must be named")
            if shared is not None and norm is not shared:
                raise ConfigError(
                    f"{ref.place}: {ref.name!r} reads the norm {norm.name}, but {refs[0].name!r} reads {shared.name}"
                )
            shared = norm
        assert shared is not None
        return shared

    def _read_by(self, linear: Linear) -> Norm | None:
        known = self._norm_by_reader.get(linear.node)
        value: ir.Value | None = linear.input
        while known is None and value is not None:
            known = self._norm_by_output.get(value)
            node = value.producer()
            value = node.inputs[0] if node is not None and node.op_type in _RESHAPING else None
        return known


def _nodes(norm: Norm) -> set[ir.Node]:
    """Every node of a norm, from its input to its output; constants on the way do not count."""
    nodes: set[ir.Node] = set()
    frontier = [norm.node]
    while frontier:
        node = frontier.pop()
        nodes.add(node)
        if norm.reads == {node}:
            continue
        for value in node.inputs:
            producer = None if value is None or value is norm.input else value.producer()
            if producer is not None and producer not in nodes and resolve_constant(value) is None:
                frontier.append(producer)
    return nodes


def _omissions(given: list[ResidualNorm], found: Sites) -> Iterator[str]:
    """What belongs to the stream and is not named, in words that follow the name of the key."""
    named = {item.node for site in given for item in (*site.previous, *site.readers, site.norm)}
    for site in found.norms:
        for item in site.previous:
            if item.node not in named:
                yield f"leaves out {item.name}, which writes to the residual stream"
        if site.norm.node not in named:
            yield f"leaves out {site.norm.name}, a norm of the residual stream"
        for linear in site.readers:
            if linear.node not in named:
                yield f"leaves out {linear.name}, which reads the same residual stream"


def _misplacements(given: list[ResidualNorm], found: Sites) -> Iterator[str]:
    """What is named and does not belong there."""
    before = {item.node: site.norm for site in found.norms for item in site.previous}
    after = {linear.node: site.norm for site in found.norms for linear in site.readers}
    norms = {site.norm.node for site in found.norms}
    for site in given:
        if site.norm.node not in norms:
            yield f"names {site.norm.name}, which is no norm of the residual stream"
            continue
        for item in site.previous:
            yield from _misplaced(item, site.norm, before, after, "is added to the stream before")
        for linear in site.readers:
            yield from _misplaced(linear, site.norm, after, before, "reads")


def _misplaced(
    item: _Item, norm: Norm, right: dict[ir.Node, Norm], other: dict[ir.Node, Norm], verb: str
) -> Iterator[str]:
    """Why ``item`` does not belong to ``norm`` in this role, if so.

    Args:
        item: What the file names.
        norm: The norm it names it with.
        right: The norm that belongs to each node in this role.
        other: The norm that belongs to each node in the other role.
        verb: The role.
    """
    if item.node in right:
        if right[item.node].node is not norm.node:
            yield f"puts {item.name} with {norm.name}, but it {verb} {right[item.node].name}"
    elif item.node in other:
        yield f"names {item.name} on the wrong side of {norm.name}"
    else:
        yield f"names {item.name}, a {item.node.op_type} that neither writes to nor reads the residual stream"


def _common_size(pairs: list[NamedPair], given: list[ResidualNorm]) -> int:
    """The one size that all parts of the stream have.

    Raises:
        ConfigError: Naming the part that differs and both sizes.
    """
    sizes = [
        (ref, size)
        for pair, site in zip(pairs, given, strict=True)
        for ref, size in (
            *((ref, _written(item)) for ref, item in zip(pair.previous, site.previous, strict=True)),
            *((ref, linear.in_features) for ref, linear in zip(pair.readers, site.readers, strict=True)),
            *([(pair.norm or pair.readers[0], site.norm.gamma.shape[-1])] if site.norm.gamma else []),
        )
    ]
    first, hidden = sizes[0]
    for ref, size in sizes:
        if size != hidden:
            raise ConfigError(f"{ref.place}: {ref.name!r} has size {size}, but {first.name!r} {hidden}; R1 needs one")
    return hidden


def _written(item: _Item) -> int:
    return item.table.shape[1] if isinstance(item, Embedding) else item.out_features


def unproven(found: Sites) -> str:
    """The note on an R1 that rests on the file alone."""
    reason = next((f": {entry.node}: {entry.reason}" for entry in found.why_not(Kind.R1)), "")
    return f"R1 follows the rotation config alone, as the residual stream was not understood{reason}"
