"""R2, R3, R4 and online pairs by name: resolved to attentions and Linears, with every stated size checked."""

from dataclasses import replace

import onnx_ir as ir

from quarot_onnx.errors import ConfigError, did_you_mean
from quarot_onnx.graph.linear import Linear
from quarot_onnx.graph.query import label
from quarot_onnx.rotation_config.dialect_own import NodeEntry, R2Entry, R3Entry
from quarot_onnx.rotation_config.names import Names, Ref, once
from quarot_onnx.sites.attention import FUSED
from quarot_onnx.sites.model import Attention, Kind, OnlinePair, Sites

ATTENTION_OPS = frozenset({"Softmax", *(op_type for _, op_type in FUSED)})


class Places:
    """The graph's names and detection's findings, to resolve entries with."""

    def __init__(self, names: Names, found: Sites) -> None:
        self._names = names
        self._found = found
        self._attentions = {attention.node: attention for attention in found.attentions}

    def r2(self, entries: list[tuple[str, R2Entry]]) -> tuple[Attention, ...]:
        """The attentions where R2 goes.

        Raises:
            ConfigError: A name or a size is wrong, or detection sees another Linear there.
        """
        attentions = [self._with_values(place, entry) for place, entry in entries]
        once([(Ref(p, e.attention), a.node) for (p, e), a in zip(entries, attentions, strict=True)])
        return tuple(attentions)

    def r3(self, entries: list[tuple[str, R3Entry]]) -> tuple[Attention, ...]:
        """The attentions where R3 goes.

        Raises:
            ConfigError: A name or a size is wrong, or R3 cannot go there.
        """
        attentions = []
        for place, entry in entries:
            ref = Ref(f"{place}.attention", entry.attention)
            attention = self._attentions.get(self._names.find(ref, ATTENTION_OPS))
            if attention is None or attention.heads is None:
                why = (e.reason for e in self._found.why_not(Kind.R3) if attention and e.node == attention.name)
                reason = next(why, "it is no attention of the decoder")
                raise ConfigError(f"{ref.place}: R3 cannot go to {ref.name!r}: {reason}")
            _check(f"{place}.head_dim", entry.head_dim, attention.head_dim, "the heads have {}")
            attentions.append(attention)
        once([(Ref(p, e.attention), a.node) for (p, e), a in zip(entries, attentions, strict=True)])
        return tuple(attentions)

    def r4(self, entries: list[tuple[str, NodeEntry]]) -> tuple[Linear, ...]:
        """The Linears at whose input R4 goes.

        Raises:
            ConfigError: A name or a size is wrong, or the Linear is no down projection of the decoder.
        """
        linears = self._linears(entries)
        known = {linear.node for linear in self._found.mlps}
        for (place, entry), linear in zip(entries, linears, strict=True):
            if known and linear.node not in known:
                near = did_you_mean(entry.node, [down.name for down in self._found.mlps])
                raise ConfigError(
                    f"{place}.node: {entry.node!r} is no down projection of the decoder{near}; "
                    "name it in online_pairs for an online Hadamard of its own"
                )
        return tuple(linears)

    def online_pairs(self, entries: list[tuple[str, NodeEntry]]) -> tuple[OnlinePair, ...]:
        """The Linears that get an online pair of their own.

        Raises:
            ConfigError: A name or a size is wrong.
        """
        linears = self._linears(entries)
        return tuple(OnlinePair(linear, entry.block_size) for (_, entry), linear in zip(entries, linears, strict=True))

    def attention_node(self, ref: Ref) -> ir.Node:
        """An attention that detection found, by name.

        Raises:
            ConfigError: It is none.
        """
        node = self._names.find(ref, ATTENTION_OPS)
        if node not in self._attentions:
            near = ", ".join(label(known) for known in list(self._attentions)[:2]) or "none"
            raise ConfigError(f"{ref.place}: {ref.name!r} is no attention of the decoder; those found: {near} ...")
        return node

    def mlp_node(self, ref: Ref) -> ir.Node:
        """A Linear where detection would put R4, by name.

        Raises:
            ConfigError: It is none.
        """
        linear = self._names.linear(ref)
        if linear.node not in {known.node for known in self._found.mlps}:
            raise ConfigError(f"{ref.place}: {ref.name!r} is no down projection of the decoder, so R4 is not there")
        return linear.node

    def _linears(self, entries: list[tuple[str, NodeEntry]]) -> list[Linear]:
        linears = []
        for place, entry in entries:
            linear = self._names.linear(Ref(f"{place}.node", entry.node))
            _check(f"{place}.size", entry.size, linear.in_features, f"{entry.node!r} has {{}} inputs")
            divides(f"{place}.block_size", entry.block_size, linear.in_features)
            linears.append(linear)
        once([(Ref(p, e.node), ln.node) for (p, e), ln in zip(entries, linears, strict=True)])
        return linears

    def _with_values(self, place: str, entry: R2Entry) -> Attention:
        """One attention with its V and O, as stated and as far as possible as found."""
        ref = Ref(f"{place}.attention", entry.attention)
        node = self._names.find(ref, ATTENTION_OPS)
        known = self._attentions.get(node)
        if known is None and node.op_type not in ATTENTION_OPS:
            raise ConfigError(f"{ref.place}: {ref.name!r} is a {node.op_type}, neither a Softmax nor a fused attention")
        value = self._names.linear(Ref(f"{place}.value", entry.value))
        output = self._names.linear(Ref(f"{place}.output", entry.output))
        if known is not None:
            _same(f"{place}.value", value, known.value, f"makes the values of {entry.attention!r}")
            _same(f"{place}.output", output, known.output, f"reads the result of {entry.attention!r}")
        base = known or Attention(node, 0, 0, 0, None, 0, None, None)
        attention = replace(
            base,
            num_heads=_size(place, entry, base, "num_heads"),
            num_kv_heads=_size(place, entry, base, "num_kv_heads"),
            head_dim=_size(place, entry, base, "head_dim"),
            value=value,
            value_start=_size(place, entry, base, "value_start"),
            output=output,
        )
        _check_geometry(place, attention)
        return attention


def divides(place: str, block: int | None, size: int) -> None:
    """Refuse a block that does not divide the size.

    Raises:
        ConfigError: Naming both.
    """
    if block is not None and size % block:
        raise ConfigError(f"{place} is {block}, which does not divide the size {size}; take a divisor of {size}")


def _size(place: str, entry: R2Entry, base: Attention, name: str) -> int:
    """A size of an attention: found and, if stated too, equal; or stated alone."""
    stated: int | None = getattr(entry, name)
    found: int = getattr(base, name)
    if base.value is not None or (name != "value_start" and found > 0):
        _check(f"{place}.{name}", stated, found, "the graph has {}")
        return found
    if stated is None:
        raise ConfigError(f"{place}.{name} is missing, and the graph does not show it at {entry.attention!r}")
    return stated


def _check(place: str, stated: int | None, found: int, what: str) -> None:
    if stated is not None and stated != found:
        raise ConfigError(f"{place} is {stated}, but {what.format(found)}")


def _same(place: str, named: Linear, found: Linear | None, what: str) -> None:
    if found is not None and named.node is not found.node:
        raise ConfigError(f"{place}: {named.name!r} is named, but {found.name!r} {what}")


def _check_geometry(place: str, attention: Attention) -> None:
    """V's columns and O's rows are whole heads."""
    assert attention.value is not None
    assert attention.output is not None
    columns, rows = attention.num_kv_heads * attention.head_dim, attention.num_heads * attention.head_dim
    if attention.value_stop > attention.value.out_features:
        raise ConfigError(
            f"{place}.value: {attention.value.name!r} has {attention.value.out_features} columns, fewer than "
            f"{attention.value_start} + {columns} (value_start + num_kv_heads · head_dim)"
        )
    if rows != attention.output.in_features:
        raise ConfigError(
            f"{place}.output: {attention.output.name!r} has {attention.output.in_features} rows, "
            f"not {rows} (num_heads · head_dim)"
        )
