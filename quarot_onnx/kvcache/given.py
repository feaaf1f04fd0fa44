"""Fixed scales from a file in place of calibrated ones, put to the caches of a graph."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quarot_onnx.config.kv_cache import KVCacheConfig
from quarot_onnx.config.saying import Said, Setting, SettingError
from quarot_onnx.errors import ConfigError
from quarot_onnx.kvcache.integers import Floats
from quarot_onnx.kvcache.layers import basis_of, by_layer
from quarot_onnx.kvcache.places import Cache, CachePlaces
from quarot_onnx.kvcache.scale_file import Basis, ScaleFile


@dataclass(frozen=True, eq=False)
class GivenScales:
    """The scales of a file.

    Attributes:
        path: The file.
        scales: By the name of a cache's output, [1, 1, 1, 1] or [1, heads, 1, head_dim].
        bases: The caches, and what the scales say was done to what each holds.
    """

    path: Path
    scales: Mapping[str, Floats]
    bases: tuple[tuple[Cache, Basis], ...]

    def refuse_other_bases(self, recipe: Mapping[str, Any] | None) -> None:
        """Refuse scales of keys or values that were not rotated as this run's are.

        Args:
            recipe: What is recorded of the model whose cache becomes integers, or will be.

        Raises:
            ConfigError: Naming the rotation and the way out.
        """
        for cache, meant in self.bases:
            found = basis_of(recipe, cache)
            name, basis = ("", {}) if found is None else found
            if basis == meant:
                continue
            what, kind = ("keys", "r3") if cache.keys else ("values", "r2")
            of = "that are rotated or scaled" if meant else "as the exported model has them"
            start = f"{self.path}: its scales are of {what} {of}, and"
            if not name:
                raise ConfigError(
                    f"{start} here they are not: take scales of the model as it is, or do what the run that wrote the "
                    "file did"
                )
            text = (
                f"{start} {name} was done to those of {cache.present.name!r}: leave it out ({{}}), or take the scales "
                "of a run that did the same"
            )
            raise SettingError(Said(text, (Setting(f"rotation.{kind}", value=False, advised=True),)))


def read_scales(path: Path, config: KVCacheConfig, places: CachePlaces) -> GivenScales:
    """The scales of a file for the caches that become integers.

    Args:
        path: The file.
        config: Of 8 or 4 bits.
        places: Where the caches are.

    Raises:
        ConfigError: It cannot be read, is no such file, or does not fit the graph's layers, heads or head_dim.
    """
    file = ScaleFile.from_json(path)
    scales, bases = dict[str, Floats](), list[tuple[Cache, Basis]]()
    for keys in (True, False):
        bits = config.grid(keys=keys).bits
        caches = by_layer(places.caches, keys=keys)
        if set(caches) != set(file.layers):
            raise ConfigError(
                f"{path}: it has scales of {_numbers(file.layers)}, and the graph caches {_numbers(caches)}: take the "
                f"file of this model{'' if file.layer_ids else ', or say which layers they are of (layer_ids)'}"
            )
        for layer, cache in caches.items() if bits is not None else ():
            assert bits is not None, "just looked at"
            found = file.scale(layer, bits, keys=keys)
            scales[cache.present.name or ""] = _shaped(found, path, layer, cache)
            bases.append((cache, file.basis(layer, keys=keys)))
    return GivenScales(path, scales, tuple(bases))


def _shaped(scale: Floats, path: Path, layer: int, cache: Cache) -> Floats:
    heads, head_dim = cache.attention.num_kv_heads, cache.attention.head_dim
    what = f"{path}: the scales of layer {layer}'s {'keys' if cache.keys else 'values'}"
    if scale.size not in {1, heads * head_dim}:
        raise ConfigError(
            f"{what} are {scale.size}, and {cache.present.name!r} has {heads} heads of {head_dim}: need 1 for the "
            f"whole tensor, or {heads * head_dim}, one for each channel"
        )
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ConfigError(f"{what} do not fit into float32 (qmax among them): take them anew")
    return scale.reshape((1, 1, 1, 1) if scale.size == 1 else (1, heads, 1, head_dim))


def _numbers(layers: Iterable[int]) -> str:
    """Layers in words."""
    numbers = sorted(layers)
    if len(numbers) == 1:
        return f"layer {numbers[0]} alone"
    dense = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"layers {numbers[0]} to {numbers[-1]}" if dense else f"layers {', '.join(map(str, numbers))}"
