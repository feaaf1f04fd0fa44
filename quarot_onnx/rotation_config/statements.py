"""What a rotation config states, whatever its dialect, and what it makes of detection's findings."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from quarot_onnx.graph.linear import Linear
from quarot_onnx.graph.query import label
from quarot_onnx.sites.model import BY_CONFIG, Attention, Embedding, Kind, LeftOut, OnlinePair, ResidualNorm, Sites


@dataclass(frozen=True, eq=False)
class R1Places:
    """R1 as a file gives it.

    Attributes:
        norms: The norms with what is written before them and what reads them.
        hidden_size: Length of the residual stream.
    """

    norms: tuple[ResidualNorm, ...]
    hidden_size: int

    def on(self, sites: Sites) -> Sites:
        """``sites`` with these places of R1."""
        previous = [item for site in self.norms for item in site.previous]
        embeddings = tuple(item for item in previous if isinstance(item, Embedding))
        head = self.norms[-1].readers
        tables = {embedding.table.value for embedding in embeddings}
        return replace(
            sites,
            embeddings=embeddings,
            norms=self.norms,
            writers=tuple(item for item in previous if isinstance(item, Linear)),
            head=head,
            hidden_size=self.hidden_size,
            tied=any(linear.weight.value in tables for linear in head),
        )


@dataclass(frozen=True, eq=False)
class Statements:
    """The statements of one file.

    Attributes:
        kinds: The rotations that the file speaks of.
        r1: Places of R1; None: where detection found them. Likewise the next three.
        r2: Attentions with value and output.
        r3: Attentions with heads.
        r4: Linears.
        online_pairs: Linears with an online pair of their own.
        left_out: Nodes that detection found and the file leaves out.
        block_sizes: Blocks of block-diagonal rotations.
        notes: What the user should know.
    """

    kinds: frozenset[Kind]
    r1: R1Places | None = None
    r2: tuple[Attention, ...] | None = None
    r3: tuple[Attention, ...] | None = None
    r4: tuple[Linear, ...] | None = None
    online_pairs: tuple[OnlinePair, ...] = ()
    left_out: Mapping[Kind, frozenset[ir.Node]] = field(default_factory=dict)
    block_sizes: Mapping[Kind, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def on(self, found: Sites, asked: frozenset[Kind]) -> Sites:
        """Detection's findings, restricted to and overruled by what is stated.

        Args:
            found: What detection found.
            asked: Rotations that are wanted though the file may not speak of them; they go where detection found.
        """
        wanted = self.kinds | asked
        given = {
            kind
            for kind, places in zip(Kind, (self.r1, self.r2, self.r3, self.r4), strict=True)
            if kind in self.kinds and places is not None
        }
        sites = self.r1.on(found) if self.r1 else found
        return replace(
            sites,
            norms=sites.norms if Kind.R1 in wanted else (),
            attentions=self._attentions(found, wanted, given),
            mlps=self._mlps(found, wanted),
            left_out=(
                *(entry for entry in found.left_out if entry.kind in wanted and entry.kind not in given),
                *(
                    LeftOut(label(node), BY_CONFIG, kind)
                    for kind, nodes in self.left_out.items()
                    for node in nodes
                    if kind in wanted
                ),
            ),
            online_pairs=self.online_pairs,
        )

    def _attentions(self, found: Sites, wanted: frozenset[Kind], given: set[Kind]) -> tuple[Attention, ...]:
        """All attentions, each with the parts that R2 and R3 need only where these go."""
        r2, r3 = ((found.attentions if places is None else places) for places in (self.r2, self.r3))
        by_kind = {
            kind: {a.node: a for a in places if a.node not in self.left_out.get(kind, ())} if kind in wanted else {}
            for kind, places in ((Kind.R2, r2), (Kind.R3, r3))
        }
        everything = {a.node: a for a in (*found.attentions, *(self.r2 or ()))}
        result = []
        for node, attention in everything.items():
            values, heads = by_kind[Kind.R2].get(node), by_kind[Kind.R3].get(node)
            base = values if values is not None and Kind.R2 in given else attention
            result.append(
                replace(
                    base,
                    value=values.value if values else None,
                    value_start=values.value_start if values else 0,
                    heads=heads.heads if heads else None,
                )
            )
        return tuple(result)

    def _mlps(self, found: Sites, wanted: frozenset[Kind]) -> tuple[Linear, ...]:
        if Kind.R4 not in wanted:
            return ()
        places = found.mlps if self.r4 is None else self.r4
        return tuple(linear for linear in places if linear.node not in self.left_out.get(Kind.R4, ()))
