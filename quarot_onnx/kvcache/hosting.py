"""How onnxruntime-genai is to hold a cache, and what the execution provider that it names makes of one."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from quarot_onnx.config.choices import CacheForm
from quarot_onnx.graph.caches import IntegerCache, reads_integers
from quarot_onnx.io.companions import genai_providers
from quarot_onnx.kvcache.plan import CachePlan

_SHARE = "past_present_share_buffer"
_CUDA = "cuda"
"""It carries a cache of integers on in one buffer alone (:mod:`quarot_onnx.sessions.carrying`)."""


def search_settings(plan: CachePlan | None, folder: Path) -> Mapping[str, object]:
    """What a genai_config.json is to set.

    Args:
        plan: What is done to the cache; None for nothing.
        folder: The original's.

    Raises:
        ConfigError: Its genai_config.json is not readable.
    """
    if plan is None or not plan.places.fused or plan.config.resolved_form is not CacheForm.INT:
        return {}
    if plan.grows:
        return {_SHARE: False}  # the graph turns all of the cache into float: at its own length, not the greatest
    return {_SHARE: True} if _CUDA in genai_providers(folder) else {}


def lost_in_genai(model: ir.Model, folder: Path) -> tuple[str, ...]:
    """What to say of a cache that onnxruntime-genai would lose.

    Args:
        model: The finished model.
        folder: The original's.
    """
    if _CUDA not in genai_providers(folder) or reads_integers(model) is not IntegerCache.MADE:
        return ()
    text = (
        "genai_config.json runs the model on CUDA, where GroupQueryAttention loses a cache of integers that does not "
        "come in as an input, and here the prefix is joined to it: generate on the CPU, go without a prefix (--prefix "
        "none), or take scales of tokens (--kv-bits 4)"
    )
    return (text,)
