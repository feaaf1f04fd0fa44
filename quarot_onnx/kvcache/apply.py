"""A key/value cache quantized in place: what calibration must see for it, the doing, and what to say of it."""

from collections.abc import Collection, Mapping
from pathlib import Path

from quarot_onnx.calibration.readers import DataReader
from quarot_onnx.config.choices import CacheForm, CacheScales
from quarot_onnx.config.kv_cache import FEW_BITS
from quarot_onnx.errors import first_and_more
from quarot_onnx.kvcache.codec import HeadGrid
from quarot_onnx.kvcache.fake import FakeCache
from quarot_onnx.kvcache.fused import FusedCache
from quarot_onnx.kvcache.integers import ALIKE, UNLIKE, Floats, Halves
from quarot_onnx.kvcache.joined import JoinedCache
from quarot_onnx.kvcache.places import ODD, UNREAD, Cache
from quarot_onnx.kvcache.plan import CachePlan, require_reader
from quarot_onnx.kvcache.scales import Observed, fixed_scales, observe_caches
from quarot_onnx.kvcache.tokens import TokenCache
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.progress import Progress
from quarot_onnx.sites.detect import Survey

Seen = Mapping[str, Observed]
"""What calibration saw, by the output that holds the cache."""

_KEPT_BYTES = 256 << 20
"""Of the values of all caches that are kept to find scales on."""

_SCALE_BYTES = 4
"""Of the scales of a token and head: a float32, or two float16."""

_SAMPLES = 16
"""How many calibration samples are usual."""


def calibrate_cache(
    file: str | Path,
    plan: CachePlan,
    reader: DataReader | None,
    *,
    max_samples: int | None = None,
    progress: Progress | None = None,
    memory: Memory = WHOLE,
) -> Seen:
    """What the fixed scales of a plan are made of; nothing where it has none.

    Args:
        file: The float model's file, the one that the plan was made on.
        plan: The plan.
        reader: Calibration data.
        max_samples: Stop after so many samples; None for all.
        progress: Called after every sample.
        memory: Whether the model is run piece by piece.
    """
    require_reader(plan, reader)
    if reader is None or not plan.calibrated:
        return {}
    grids = (plan.config.grid(keys=keys) for keys in (True, False))
    kept = 0
    if min(grid.bits for grid in grids if grid.bits is not None) <= FEW_BITS:
        width = sum(cache.attention.num_kv_heads * cache.attention.head_dim for cache in plan.places.caches)
        kept = max(_KEPT_BYTES // (4 * width * _SAMPLES), 1)
    return observe_caches(
        file, plan.calibrated, reader, kept=kept, max_samples=max_samples, progress=progress, memory=memory
    )


def apply_cache(survey: Survey, plan: CachePlan, seen: Seen, balanced: Collection[str] = ()) -> None:
    """Quantize the cache of a model in place.

    Args:
        survey: The model that the plan was made on.
        plan: The plan.
        seen: From `calibrate_cache`.
        balanced: The outputs that hold balanced keys.
    """
    config, places, model = plan.config, plan.places, survey.model
    if config.resolved_form is CacheForm.FAKE:
        FakeCache(model, config).write(places)
        return
    joined, fused, tokens = JoinedCache(model), FusedCache(model), TokenCache(model)
    for place in places.joined:
        if config.grid(keys=place.keys).bits is not None:
            halves = _halves(plan, place, balanced)
            joined.write(place, config.grid(keys=place.keys), _fixed(plan, place, seen), halves)
    for operator in places.fused:
        assert config.k_bits is not None, "K and V alike"
        if not plan.fixed:
            grids = [
                HeadGrid(_halves(plan, cache, balanced), config.grid(keys=cache.keys).clip_ratio)
                for cache in (operator.keys, operator.values)
            ]
            tokens.write(operator, *grids)
            continue
        keys, values = (_fixed(plan, cache, seen) for cache in (operator.keys, operator.values))
        assert keys is not None
        assert values is not None
        fused.write(operator, config.k_bits, keys, values)


def _halves(plan: CachePlan, cache: Cache, balanced: Collection[str]) -> Halves:
    """How two entries of 4 bits share a byte."""
    return UNLIKE if plan.halved and cache.present.name in balanced else ALIKE


def _fixed(plan: CachePlan, cache: Cache, seen: Seen) -> Floats | None:
    """The fixed scales of a cache; None where tokens have their own."""
    if plan.given is not None:
        return plan.given.scales.get(cache.present.name or "")
    own = seen.get(cache.present.name or "")
    if own is None:
        return None
    return fixed_scales(own, plan.config.grid(keys=cache.keys), plan.scales(keys=cache.keys))


def cache_notes(plan: CachePlan) -> tuple[str, ...]:
    """What a user should know of a cache, before it is changed: the bytes of a position, and how they are held.

    Of a form that was not asked for the notes of the configuration speak.
    """
    config, places = plan.config, plan.places
    left = ((places.odd, ODD), (places.unread, UNREAD))
    odd = tuple(f"left in float at {first_and_more(names)}: {why}" for names, why in left if names)
    if config.resolved_form is CacheForm.FAKE:
        asked = config.form is CacheForm.FAKE
        return (*(("the key/value cache is rounded, and as large as before: its form is fake",) if asked else ()), *odd)
    before, after, of_tokens = float(places.bytes_left), float(places.bytes_left), plan.key_scales is CacheScales.TOKEN
    for cache in places.caches:
        bits, heads = config.grid(keys=cache.keys).bits, cache.attention.num_kv_heads
        assert cache.past.dtype is not None, "a cache has a type"
        entries = heads * cache.attention.head_dim
        before += entries * cache.past.dtype.itemsize
        scales = _SCALE_BYTES * heads if of_tokens else 0
        after += entries * cache.past.dtype.itemsize if bits is None else entries * bits / 8 + scales
    kind = "scales for each token and head beside them" if of_tokens else "fixed scales"
    if plan.grows:
        kind = (
            "and behind those of a head its scales; onnxruntime-genai is to hold it without past_present_share_buffer"
        )
    what = f"the key/value cache takes {after:.0f} bytes a position in place of {before:.0f}: integers, {kind}"
    return (f"{what}{', where it is quantized' if odd else ''}", *odd)
