"""WHERE rotations go: the places of R1 to R4 in a decoder's graph, as data.

Which side of a rotation cancels where (y = x W, W: [in, out], R Rᵀ = I):

==========  =============================  ==================================  =======================
rotation    is put in by                   is taken out by                     at
==========  =============================  ==================================  =======================
R1 [h, h]   embedding E R, writers W R     readers Rᵀ diag(γ) W, γ becomes 1   every norm of the stream
R2 [d, d]   V's columns, per KV head       O's rows, per query head            every attention
R3 [d, d]   Q and K after RoPE (online)    the score product Q Kᵀ itself       every attention
R4 [m, m]   down_proj's input (online)     down_proj's rows                    every MLP
==========  =============================  ==================================  =======================

Writers are Linears whose output is added to the residual stream, readers are Linears that read a norm of
it. Sources: QuaRot (Ashkboos et al. 2024, sections 4.1-4.3), SpinQuant (Liu et al. 2024, section 3).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import onnx_ir as ir

from quarot_onnx.graph.linear import Linear
from quarot_onnx.graph.query import Constant, label


class Kind(StrEnum):
    """The four rotations of QuaRot and SpinQuant."""

    R1 = "R1"
    R2 = "R2"
    R3 = "R3"
    R4 = "R4"


@dataclass(frozen=True, eq=False)
class Embedding:
    """A table of vectors that starts the residual stream.

    Attributes:
        node: The Gather.
        table: The constant table, seen as [rows, hidden].
    """

    node: ir.Node
    table: Constant

    @property
    def name(self) -> str:
        """The node's name as messages give it."""
        return label(self.node)


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMSNorm, x · rsqrt(mean(x²) + ε) · γ, in whatever spelling.

    Attributes:
        node: The node that messages name: the fused operator, or the last node of the spelt-out form.
        input: The value that is normalised (for a Skip-norm: one of the two that are added first).
        output: The normalised value, after γ.
        gamma: γ as the graph stores it, [hidden]; None when the norm has none.
        gamma_use: The node and the input index where γ enters.
        gamma_offset: Added to the stored γ (Gemma stores γ - 1); then ``gamma_use`` is the Mul by the sum.
        reads: The nodes through which the norm reads its input.
    """

    node: ir.Node
    input: ir.Value
    output: ir.Value
    gamma: Constant | None
    gamma_use: tuple[ir.Node, int] | None
    gamma_offset: float = 0.0
    reads: frozenset[ir.Node] = frozenset()

    @property
    def name(self) -> str:
        """The node's name as messages give it."""
        return label(self.node)


@dataclass(frozen=True, eq=False)
class ResidualNorm:
    """A norm of the residual stream, with what writes before it and what reads it: one R1 site.

    Attributes:
        previous: What was added to the stream since the norm before (the embedding, a writer, or several).
        norm: The norm.
        readers: The Linears that read the norm's output.
    """

    previous: tuple[Embedding | Linear, ...]
    norm: Norm
    readers: tuple[Linear, ...]


HEADS_APART, HEADS_PACKED = 4, 3
"""Axes of [batch, heads, seq, head_dim] and of [batch, seq, heads · head_dim]."""


@dataclass(frozen=True, eq=False)
class HeadRotation:
    """An R3 site: where Q and K pass after RoPE.

    Attributes:
        query: Q as [..., head_dim] or packed [batch, seq, heads · head_dim].
        key: K likewise, before the past-key Concat.
        fused: A GroupQueryAttention with RoPE inside, which must be split; then query and key are None.
        rope_width: How many entries of a head its RoPE turns, the first ones; None where it has no RoPE inside.
    """

    query: ir.Value | None
    key: ir.Value | None
    fused: ir.Node | None = None
    rope_width: int | None = None


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention: softmax(Q Kᵀ) V O.

    Attributes:
        node: The Softmax or the fused operator.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Length of a head of V (and of Q and K).
        value: The Linear that makes V (merged with Q and K or not), or None when it could not be traced.
        value_start: First of V's columns in ``value``'s output.
        output: The O Linear, or None when it could not be traced.
        heads: The R3 site, or None.
        value_cache: The output of the graph by which V leaves as a cache, if it does.
        key_cache: The same of K.
    """

    node: ir.Node
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value: Linear | None
    value_start: int
    output: Linear | None
    heads: HeadRotation | None
    value_cache: str | None = None
    key_cache: str | None = None

    @property
    def name(self) -> str:
        """The node's name as messages give it."""
        return label(self.node)

    @property
    def value_stop(self) -> int:
        """One past the last of V's columns."""
        return self.value_start + self.num_kv_heads * self.head_dim


_PARTICULAR = re.compile(r"\S*[\d/]\S*")
"""A name, or a number."""


BY_CONFIG = "the rotation config leaves it out"
"""The reason of what was asked to be left out."""


@dataclass(frozen=True)
class LeftOut:
    """A place where a rotation cannot go.

    Attributes:
        node: The name of the node at fault.
        reason: Why, in words.
        kind: Which rotation.
    """

    node: str
    reason: str
    kind: Kind


def grouped(entries: Iterable[LeftOut]) -> list[str]:
    """What is left out, a line for each reason: with its node, or the number of its places and the first of them.

    Reasons that differ in the names and numbers in them are one: a model has a place in every block, or expert.
    """
    places: dict[str, list[LeftOut]] = {}
    for entry in entries:
        places.setdefault(_PARTICULAR.sub("", entry.reason), []).append(entry)
    return [
        f"{f'{len(alike)} places, the first ' if len(alike) > 1 else ''}{alike[0].node}: {alike[0].reason}"
        for alike in places.values()
    ]


@dataclass(frozen=True, eq=False)
class Sites:
    """Everything that was found.

    Attributes:
        embeddings: The tables that start the residual stream.
        norms: The R1 sites; empty when R1 cannot be done.
        writers: All Linears that write to the stream.
        attentions: All attentions; R2 and R3 sites where the fields say so.
        mlps: The Linears at whose input R4 goes.
        head: The language model head: the Linears that read the last norm.
        layers: The number of decoder blocks.
        hidden_size: Length of the residual stream; 0 when there is none.
        tied: The embedding's table is also a head's weight.
        architecture: The family that the structure shows: "llama", "qwen2", "qwen3", "phi3", ...
        left_out: What cannot be rotated and why.
        online_pairs: Linears that a config file names for an online pair of their own.
    """

    embeddings: tuple[Embedding, ...]
    norms: tuple[ResidualNorm, ...]
    writers: tuple[Linear, ...]
    attentions: tuple[Attention, ...]
    mlps: tuple[Linear, ...]
    head: tuple[Linear, ...]
    layers: int
    hidden_size: int
    tied: bool
    architecture: str
    left_out: tuple[LeftOut, ...]
    online_pairs: tuple["OnlinePair", ...] = ()

    @property
    def r2(self) -> tuple[Attention, ...]:
        """The attentions where R2 goes."""
        return tuple(a for a in self.attentions if a.value is not None and a.output is not None)

    @property
    def r3(self) -> tuple[Attention, ...]:
        """The attentions where R3 goes."""
        return tuple(a for a in self.attentions if a.heads is not None)

    def counts(self) -> dict[str, int]:
        """How many sites there are of each kind."""
        return {"R1": len(self.norms), "R2": len(self.r2), "R3": len(self.r3), "R4": len(self.mlps)}

    def why_not(self, kind: Kind) -> Iterator[LeftOut]:
        """The reasons recorded for one kind."""
        return (entry for entry in self.left_out if entry.kind == kind)


@dataclass(frozen=True, eq=False)
class OnlinePair:
    """A Linear that gets an online Hadamard before it and the inverse in its weight.

    Attributes:
        linear: The Linear.
        block_size: Block of a block-diagonal Hadamard, or None for a full one.
    """

    linear: Linear
    block_size: int | None = None
