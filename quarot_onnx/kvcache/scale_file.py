"""The file of fixed scales that onnxruntime-genai's model builder takes (`kv_cache_scale_file`), and we write.

::

    {"scales": {"k_scales": [[...], ...], "v_scales": [[...], ...]}, "qmax": 128.0, "layer_ids": [0, 1, ...],
     "quarot_onnx": {"bases": {"R3[64]": {...}}, "k": ["R3[64]", ...], "v": [null, ...]}}

An entry is a layer's, one scale for the whole tensor or one for each channel, head by head: [KV heads · head_dim].
``layer_ids`` says of which layer; without it they are of layers 0, 1, .... ``qmax`` is what the builder divided by, 128
for 8 bits and 8 for 4: scales for other integers are scale · qmax / own qmax; without it they are taken as they are.
``quarot_onnx`` is ours, and other readers pass over it: the basis of each layer's keys and values, so that scales of
rotated ones are not taken for others. Without it they are as the exported model has them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BeforeValidator, Field, StrictInt, model_validator

from quarot_onnx.config.files import FileConfig
from quarot_onnx.config.strict import Strict
from quarot_onnx.kvcache.integers import Floats

_QMAX = {8: 128.0, 4: 8.0}
"""The builder's, by bits."""

_SECTION = "model"
"""The builder's files for several models hold a section for each, this one for the decoder."""

Basis = Mapping[str, Any]
"""What was done to keys or values, in JSON types; empty for nothing."""


def _entry(value: object) -> object:
    """One scale, or nested lists of them, as a flat list."""
    try:
        return np.asarray([value] if isinstance(value, int | float) else value, np.float64).reshape(-1).tolist()
    except (TypeError, ValueError):
        raise ValueError("a layer has one scale, or a list of one for each channel") from None


_Entry = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_entry)]
_Layer = Annotated[StrictInt, Field(ge=0)]


class _Scales(Strict):
    """Those of keys and of values, by layer."""

    k_scales: tuple[_Entry, ...]
    v_scales: tuple[_Entry, ...]


class _Bases(Strict):
    """The bases, and for each layer the name of its own."""

    bases: dict[str, dict[str, Any]]
    k: tuple[str | None, ...]
    v: tuple[str | None, ...]


class ScaleFile(FileConfig):
    """What the file holds.

    Attributes:
        scales: Those of keys and of values, an entry for each layer.
        qmax: What they were divided by; None: they are for the integers that are wanted.
        layer_ids: The layers, in the order of the entries; None for 0, 1, ....
        quarot_onnx: What was done to keys and values before; None for nothing.
    """

    scales: _Scales
    qmax: Annotated[float | None, Field(gt=0, strict=True)] = None
    layer_ids: tuple[_Layer, ...] | None = None
    quarot_onnx: _Bases | None = None

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Take the section of the decoder where the file has several."""
        section = data.get(_SECTION)
        return dict(section) if isinstance(section, Mapping) and "scales" not in data else data

    @model_validator(mode="after")
    def _fits(self) -> Self:
        counts = {"k_scales": len(self.scales.k_scales), "v_scales": len(self.scales.v_scales)}
        if self.layer_ids is not None:
            counts["layer_ids"] = len(self.layer_ids)
            if len(set(self.layer_ids)) != len(self.layer_ids):
                raise ValueError(f"layer_ids {list(self.layer_ids)} names a layer twice; take one out")
        if self.quarot_onnx is not None:
            counts |= {f"quarot_onnx.{what}": len(getattr(self.quarot_onnx, what)) for what in "kv"}
            named = {name for name in (*self.quarot_onnx.k, *self.quarot_onnx.v) if name is not None}
            if unknown := sorted(named - self.quarot_onnx.bases.keys()):
                raise ValueError(f"quarot_onnx.bases has no {unknown[0]!r}; write the file anew")
        if len(set(counts.values())) > 1 or not self.scales.k_scales:
            said = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise ValueError(f"{said}: every layer needs one of each, and there is one layer at least")
        return self

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of every entry."""
        return tuple(range(len(self.scales.k_scales))) if self.layer_ids is None else self.layer_ids

    def scale(self, layer: int, bits: int, *, keys: bool) -> Floats:
        """The scales of a layer for integers of so many bits, flat; float32 may not hold them (0 or infinite)."""
        entries = self.scales.k_scales if keys else self.scales.v_scales
        own = np.asarray(entries[self.layers.index(layer)], np.float32).astype(np.float64)
        with np.errstate(over="ignore", under="ignore"):
            return (own * (1.0 if self.qmax is None else self.qmax / _QMAX[bits])).astype(np.float32)

    def basis(self, layer: int, *, keys: bool) -> Basis:
        """What was done to the keys or the values of a layer that the scales are of."""
        if self.quarot_onnx is None:
            return {}
        names = self.quarot_onnx.k if keys else self.quarot_onnx.v
        name = names[self.layers.index(layer)]
        return {} if name is None else self.quarot_onnx.bases[name]


def file_name(target: str | Path) -> str:
    """What the file beside a model is called."""
    return f"{Path(target).stem}.kv_scales.json"


def content(
    scales: Mapping[bool, Mapping[int, Floats]], bases: Mapping[bool, Mapping[int, tuple[str, Basis]]], bits: int
) -> bytes:
    """The file's content.

    Args:
        scales: By layer, those of keys under True, those of values under False, as the operator has them.
        bases: What was done to each, with a name for it; layers to which nothing was done are not there.
        bits: Of the integers.
    """
    layers = sorted(scales[True])
    sides = {True: "k", False: "v"}
    known = dict(found for side in sides for found in bases[side].values())
    own: dict[str, Any] = {"bases": known}
    own |= {what: [bases[side].get(layer, (None,))[0] for layer in layers] for side, what in sides.items()}
    data = {
        "scales": {
            f"{what}_scales": [scales[side][layer].reshape(-1).tolist() for layer in layers]
            for side, what in sides.items()
        },
        "qmax": _QMAX[bits],
        "layer_ids": layers,
        "quarot_onnx": own,
    }
    return f"{json.dumps(data, allow_nan=False)}\n".encode()
