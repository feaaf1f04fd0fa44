"""At which of the places found a rotation can be done: there must be a Hadamard matrix for the size.

What is planned and what ``inspect`` tells both come from here.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

from quarot_onnx.hadamard.orders import largest_block, missing, usual_block
from quarot_onnx.sites.model import Attention, Kind, LeftOut, Sites


def feasible(sites: Sites, block_sizes: Mapping[Kind, int], given: Collection[Kind] = ()) -> Sites:
    """The places without those where a rotation is impossible, which are left out with the reason.

    Args:
        sites: What was found or named.
        block_sizes: Kinds whose blocks are asked for; such blocks are judged where they are used.
        given: Kinds whose matrix is given.

    Returns:
        The places; online pairs stay, as a file asks for each of them.
    """
    chosen = {*block_sizes, *given}
    left_out: list[LeftOut] = []

    def possible(kind: Kind, node: str, size: int) -> bool:
        reason = None if kind in chosen else why_not(size)
        if reason is not None:
            left_out.append(LeftOut(node, reason, kind))
        return reason is None

    def checked(attention: Attention) -> Attention:
        values = attention.value is not None and attention.output is not None
        if values and not possible(Kind.R2, attention.name, attention.head_dim):
            attention = replace(attention, value=None)
        if attention.heads is not None and not possible(Kind.R3, attention.name, attention.head_dim):
            attention = replace(attention, heads=None)
        return attention

    norms = sites.norms
    if norms:
        origin = sites.embeddings[0].name if sites.embeddings else norms[0].norm.name
        norms = norms if possible(Kind.R1, origin, sites.hidden_size) else ()
    attentions = tuple(checked(attention) for attention in sites.attentions)
    mlps = tuple(linear for linear in sites.mlps if possible(Kind.R4, linear.name, linear.in_features))
    return replace(sites, norms=norms, attentions=attentions, mlps=mlps, left_out=(*sites.left_out, *left_out))


def why_not(size: int) -> str | None:
    """Why no rotation of a size is worth having; None where one is."""
    if usual_block(size) is not None:
        return None
    return f"{missing(size)}, nor of a divisor above {largest_block(size)}"
