"""Which layer a cache is of: what a file of scales goes by."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from quarot_onnx.config.kv_cache import KVCacheConfig
from quarot_onnx.graph.metadata import transforms_of
from quarot_onnx.kvcache.places import Cache
from quarot_onnx.kvcache.scale_file import Basis

_NUMBER = re.compile(r"(?<![^._/])\d+(?![^._/])")
"""``present.3.key``, ``past_key_values_3_key``."""


def by_layer(caches: Sequence[Cache], *, keys: bool) -> dict[int, Cache]:
    """The caches of keys, or of values, by the number in their names; where these do not tell, in the graph's order."""
    own = [cache for cache in caches if cache.keys == keys]
    told = [_NUMBER.search(cache.present.name or "") for cache in own]
    numbers = [int(found[0]) for found in told if found is not None]
    return dict(zip(numbers if len(set(numbers)) == len(own) else range(len(own)), own, strict=True))


def balanced_caches(recipe: Mapping[str, Any] | None) -> frozenset[str]:
    """The outputs that hold balanced keys, as a record says."""
    entries = [entry for entry in transforms_of(recipe) if entry["name"] == KVCacheConfig.model_fields["name"].default]
    return frozenset(name for entry in entries for name in entry["caches"])


def basis_of(recipe: Mapping[str, Any] | None, cache: Cache) -> tuple[str, Basis] | None:
    """What a record says was done to what a cache holds, with a name for it; None for nothing.

    Args:
        recipe: The record of the model.
        cache: The cache.
    """
    present = cache.present.name or ""
    rotation = (recipe or {}).get("rotation") or {}
    name = rotation.get("caches", {}).get(present)
    found = (
        {} if name is None else {key: value for key, value in rotation["rotations"][name].items() if key != "origin"}
    )
    scaled = [entry for entry in transforms_of(recipe) if present in entry.get("caches", ())]
    if scaled:
        found |= {entry["name"]: entry["config"] for entry in scaled}
    names = [*([] if name is None else [name]), *(entry["name"] for entry in scaled)]
    return (" ".join(names), found) if names else None
