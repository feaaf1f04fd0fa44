"""The key/value cache of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.graph.metadata import recorded
from quarot_onnx.graph.query import data_input
from quarot_onnx.io.tensors import read_array
from quarot_onnx.kvcache import scale_file
from quarot_onnx.kvcache.apply import apply_cache, cache_notes, calibrate_cache
from quarot_onnx.kvcache.integers import Floats
from quarot_onnx.kvcache.layers import balanced_caches, basis_of, by_layer
from quarot_onnx.kvcache.plan import CachePlan, plan_cache
from quarot_onnx.progress import of_phase
from quarot_onnx.rotation.edits import Plan
from quarot_onnx.run.preparing import Run, Start
from quarot_onnx.run.provenance import make_recipe
from quarot_onnx.sites.attention import K_SCALE


@dataclass(frozen=True)
class Cached:
    """What came of the cache.

    Attributes:
        notes: What the user should know.
        beside: What goes beside the model, by name.
        record: What the report says of it.
    """

    notes: tuple[str, ...] = ()
    beside: Mapping[str, bytes] = field(default_factory=dict)
    record: Mapping[str, object] = field(default_factory=dict)


def check_scales(plan: CachePlan | None, model: ir.Model, rotation: tuple[Plan, QuarotConfig] | None) -> None:
    """Refuse a file of scales that are of other keys and values than this run makes, before any long work.

    Args:
        plan: Of the cache; None where it stays in float.
        model: The model.
        rotation: What this run does to it; None where it stays, or was rotated before.
    """
    if plan is not None and plan.given is not None:
        plan.given.refuse_other_bases(recorded(model) if rotation is None else make_recipe(rotation=rotation))


def quantize_cache(start: Start, run: Run, target: str | Path) -> Cached:
    """Quantize the cache of the float model in place, where that is asked for.

    Args:
        start: The model.
        run: What is asked for.
        target: The .onnx file to be written.
    """
    if run.config.kv_cache is None:
        return Cached()
    survey = start.selection.survey
    plan = plan_cache(survey, run.config.kv_cache)
    progress = of_phase(run.progress, "cache")
    seen = calibrate_cache(
        start.file, plan, start.reader, max_samples=start.limit, progress=progress, memory=run.memory
    )
    notes = cache_notes(plan)
    apply_cache(survey, plan, seen, balanced_caches(recorded(start.model)))
    run.clock.lap("cache")
    written = _scale_file(plan, recorded(start.model))
    if written is None:
        return Cached(notes)
    name = scale_file.file_name(target)
    note = f"the scales of the key/value cache are in {name}, too, in the format of onnxruntime-genai's model builder"
    turned = any(basis_of(recorded(start.model), cache) for cache in plan.places.caches)
    note += "; they are of what this graph caches, rotated, and not of the export's keys and values" if turned else ""
    return Cached((*notes, note), {name: written}, {"kv_cache": {"scale_file": name}})


def _scale_file(plan: CachePlan, recipe: Mapping[str, Any] | None) -> bytes | None:
    """The scales of GroupQueryAttentions as a file; None where there are none."""
    bits, operators = plan.config.k_bits, plan.places.fused
    if not plan.fixed or bits is None or not operators:
        return None
    nodes = {place.keys.present: place.node for place in operators} | {
        place.values.present: place.node for place in operators
    }
    scales, bases = dict[bool, dict[int, Floats]](), dict[bool, dict[int, tuple[str, scale_file.Basis]]]()
    for keys in (True, False):
        caches = by_layer([cache for place in operators for cache in (place.keys, place.values)], keys=keys)
        inputs = {layer: data_input(nodes[cache.present], K_SCALE + (not keys)) for layer, cache in caches.items()}
        scales[keys] = {layer: _constant(value) for layer, value in inputs.items()}
        found = {layer: basis_of(recipe, cache) for layer, cache in caches.items()}
        bases[keys] = {layer: basis for layer, basis in found.items() if basis is not None}
    return scale_file.content(scales, bases, bits)


def _constant(value: ir.Value) -> Floats:
    assert value.const_value is not None, "written before"
    return read_array(value.const_value)
