"""Graphs whose key/value cache is of integers already: nothing is rotated or scaled in them.

The scales of such a cache are of keys and values as they are (R2, R3 and SmoothQuant change those), and its rounding
turns the last digits that any rewriting changes into whole steps, so that no comparison can tell a right rotation from
a wrong one.
"""

from dataclasses import replace

import onnx_ir as ir

from quarot_onnx.errors import ModelError
from quarot_onnx.graph.caches import presents
from quarot_onnx.graph.query import FLOAT_TYPES
from quarot_onnx.sites.model import Kind, LeftOut, Sites


def integer_cache(graph: ir.Graph) -> str | None:
    """The first cache of integers, and its type, in words; None where there is none."""
    for past in presents(graph):
        if past.dtype is not None and past.dtype not in FLOAT_TYPES:
            return f"{past.name!r} is {past.dtype.name}"
    return None


def refuse_integer_cache(graph: ir.Graph, what: str, without: str) -> None:
    """Refuse to change what such a graph computes in between.

    Args:
        graph: The graph.
        what: What was to be done: ``rotated``.
        without: How to go without, in words.

    Raises:
        ModelError: It has such a cache.
    """
    found = integer_cache(graph)
    if found is not None:
        raise ModelError(
            f"the key/value cache is quantized already ({found}), with scales of keys and values as they are and "
            f"rounding that no proof sees through, so the model cannot be {what}: start from the export whose cache is "
            f"float and quantize that here (--kv-bits), or {without}"
        )


def without_sites(sites: Sites, graph: ir.Graph) -> Sites:
    """The places of a graph, none where its cache is of integers; with the reason."""
    found = integer_cache(graph)
    if found is None or not sites.attentions:
        return sites
    reason = f"the key/value cache is quantized already ({found})"
    name = sites.attentions[0].name
    attentions = tuple(replace(item, value=None, value_start=0, heads=None) for item in sites.attentions)
    left_out = tuple(LeftOut(name, reason, kind) for kind in (Kind.R1, Kind.R2, Kind.R3, Kind.R4))
    return replace(sites, norms=(), attentions=attentions, mlps=(), left_out=left_out)
