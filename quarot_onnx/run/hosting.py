"""Where the output will run, by the genai_config.json beside the model: what that is told, and what pays there."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from quarot_onnx.config import QConfig
from quarot_onnx.config.choices import OutputFormat
from quarot_onnx.errors import ModelError
from quarot_onnx.graph.caches import computes_in, reads_integers
from quarot_onnx.io.companions import genai_providers
from quarot_onnx.kvcache.plan import CachePlan
from quarot_onnx.quantization.select import Selection
from quarot_onnx.sessions.carrying import INSTEAD, dropped
from quarot_onnx.sessions.providers import current

_SHARE = "past_present_share_buffer"
_CUDA = "cuda"
"""It carries a cache of integers on in one buffer alone (:mod:`quarot_onnx.sessions.carrying`)."""


def search_settings(plan: CachePlan | None, folder: Path) -> Mapping[str, object]:
    """What a genai_config.json is to say of how the cache is held.

    Args:
        plan: What is done to the cache; None for nothing.
        folder: The original's.
    """
    if plan is not None and plan.grows:
        return {_SHARE: False}  # the graph turns all of the cache into float: at its own length, not the greatest
    if plan is not None and plan.kept_by_operators and _CUDA in genai_providers(folder):
        return {_SHARE: True}
    return {}


def refuse_lost(plan: CachePlan | None, *, prefixed: bool) -> None:
    """Refuse, before any long work, a cache that this run's own provider would lose behind a prefix in the graph.

    Args:
        plan: What is done to the cache; None for nothing.
        prefixed: There may be such a prefix.

    Raises:
        ModelError: It would.
    """
    if plan is None or not prefixed or not plan.kept_by_operators:
        return
    if why := dropped(computes_in(plan.places.fused[0].node)):
        raise ModelError(f"{why}, and a prefix in the graph would always stand before it; {INSTEAD}")


def hosting_notes(model: ir.Model, selection: Selection, config: QConfig, folder: Path) -> tuple[str, ...]:
    """What to say of an output that will run on CUDA.

    Args:
        model: The finished model.
        selection: What is quantized of it.
        config: How.
        folder: The original's.
    """
    in_genai, notes = _CUDA in genai_providers(folder), []
    there = "genai_config.json runs the model on CUDA, where" if in_genai else "on CUDA"
    rounded = any(job.config.activation is not None for job in selection.linears)
    runs = config.resolved_format is not OutputFormat.FAKE
    if rounded and runs and (in_genai or _CUDA in current().name.lower()):
        notes.append(
            f"{there} onnxruntime computes 8-bit activations in float or leaves them to the CPU: weights alone gain "
            "there (--scheme w8 or w4a16)"
        )
    integers = reads_integers(model) if in_genai else None
    if integers is not None and integers.made:
        notes.append(
            f"{there} GroupQueryAttention loses a cache of integers that does not come in as an input, and here the "
            "prefix is joined to it: generate on the CPU, go without one (--prefix none), or take scales of tokens "
            "(--kv-bits 4)"
        )
    return tuple(notes)
