"""Which outputs of two models are compared, and up to what.

Every float output of the first is compared with its namesake in the second. A rotation may change one thing alone, the
caches: R2 rotates the heads of V, R3 those of K. What the record in a model's metadata states is undone before its
caches are compared; those that a transform (SmoothQuant, balanced keys) has changed are left out. Where neither model
has a record, the caches that the graph takes back are compared up to some rotation of the heads, by the products of all
pairs of positions: (X R)(X R)ᵀ = X Xᵀ.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.inputs import FLOATS
from quarot_onnx.errors import ConfigError, ModelError
from quarot_onnx.graph.metadata import recorded, transforms_of
from quarot_onnx.hadamard.rotation import Rotation


@dataclass(frozen=True)
class Compared:
    """An output of both models.

    Attributes:
        name: In the first model.
        other: In the second.
        cache: It is a cache, which holds all positions at the end of a window.
        rotations: The rotation that each of the two models has put on it, by its record.
        up_to: What is not told apart, in words; empty for nothing.
    """

    name: str
    other: str
    cache: bool = False
    rotations: tuple[Rotation | None, Rotation | None] = (None, None)
    up_to: str = ""

    def rows(self, output: npt.NDArray[Any], side: int) -> npt.NDArray[Any]:
        """What is compared of an output, ``[rows, last dimension]``; ``side`` is 0 for the first model, else 1."""
        if output.ndim < 2:
            return output.reshape(-1, 1)
        rotation = self.rotations[side]
        if rotation is not None and output.shape[-1] % rotation.size == 0:
            turned = rotation.apply(output.reshape(-1, rotation.size), inverse=True)
            return turned.reshape(-1, output.shape[-1])
        if self.up_to == ANY:
            wide = output.astype(np.float64)
            output = wide @ wide.swapaxes(-1, -2)
        return output.reshape(-1, output.shape[-1])


ANY = "a rotation of the heads"


@dataclass(frozen=True)
class Pairing:
    """What is compared and what is not.

    Attributes:
        outputs: Those that are; of a decoder the logits first.
        left: Float outputs that are not, with the reason.
    """

    outputs: tuple[Compared, ...]
    left: dict[str, str]

    def with_itself(self) -> "Pairing":
        """The same outputs of the first model, in place of the second's too."""
        alike = (replace(item, other=item.name, rotations=(item.rotations[0],) * 2) for item in self.outputs)
        return Pairing(tuple(alike), {})


def pair_decoders(model_a: ir.Model, a: ModelInputs, model_b: ir.Model, b: ModelInputs) -> Pairing:
    """The outputs of two decoders: logits, then whatever else is float.

    Args:
        model_a: The first model.
        a: Its inputs.
        model_b: The second.
        b: Its inputs.
    """
    names_a, names_b = float_output_names(model_a), float_output_names(model_b)
    records = _Caches(model_a), _Caches(model_b)
    own = [present for _, present in a.presents]
    alike = len(a.presents) == len(b.presents)
    by_place = dict(zip(own, (present for _, present in b.presents), strict=True)) if alike else {}
    outputs, left, paired = [Compared(a.logits, b.logits)], {}, {b.logits}
    for name in names_a:
        other = name if name in names_b else by_place.get(name)
        if name == a.logits or other == b.logits:
            continue
        if other not in names_b:
            left[name] = _absent("second", model_b, other or name)
            continue
        paired.add(other)
        if records[0].changes(name) or records[1].changes(other):
            left[name] = "a transform has changed it"
            continue
        cache = name in own or name in records[0] or other in records[1]
        outputs.append(_cache(name, other, records) if cache else Compared(name, other))
    left |= {name: _absent("first", model_a, name) for name in names_b if name not in paired}
    return Pairing(tuple(outputs), left)


def _absent(which: str, model: ir.Model, name: str) -> str:
    """Why a model has no float output of a name."""
    there = any(value.name == name for value in model.graph.outputs)
    return f"the {which} model puts out integers" if there else f"the {which} model has no such output"


def pair_others(path_a: str | Path, model_a: ir.Model, path_b: str | Path, model_b: ir.Model) -> Pairing:
    """The float outputs of two graphs that are no decoders, in their order.

    Raises:
        ModelError: They do not take the same inputs, or have no pairs of outputs.
    """
    wanted, offered = ({value.name for value in model.graph.inputs} for model in (model_a, model_b))
    if wanted != offered:
        raise ModelError(f"{path_a} and {path_b} have different inputs: {sorted(map(str, wanted ^ offered))}")
    names_a, names_b = float_output_names(model_a), float_output_names(model_b)
    if not names_a:
        raise ModelError("the graph has no float output to compare")
    if len(names_a) != len(names_b):
        raise ModelError(f"{path_a} has {len(names_a)} float outputs and {path_b} {len(names_b)}: no pairs")
    return Pairing(tuple(map(Compared, names_a, names_b)), {})


def _cache(name: str, other: str, records: tuple["_Caches", "_Caches"]) -> Compared:
    """A cache, up to what the records state."""
    first, second = records[0].of(name), records[1].of(other)
    if records[0].known or records[1].known:
        try:
            rotations = tuple(None if record is None else Rotation.from_dict(record[1]) for record in (first, second))
        except ConfigError:  # a given matrix is recorded by its hash alone
            return Compared(name, other, cache=True, up_to=ANY)
        words = " and ".join(dict.fromkeys(record[0] for record in (first, second) if record is not None))
        return Compared(name, other, cache=True, rotations=(rotations[0], rotations[1]), up_to=words)
    return Compared(name, other, cache=True, up_to=ANY)


class _Caches:
    """The rotated caches that a model's record states.

    Attributes:
        known: There is a record of a rotation, and it says which caches are rotated.
    """

    def __init__(self, model: ir.Model) -> None:
        recipe = recorded(model) or {}
        rotation = recipe.get("rotation")
        content: Mapping[str, Any] = rotation if isinstance(rotation, dict) else {}
        self.known = isinstance(content.get("caches"), dict)
        self._caches: Mapping[str, str] = content.get("caches") or {}
        self._changed = frozenset(name for entry in transforms_of(recipe) for name in entry["caches"])
        self._rotations: Mapping[str, Any] = content.get("rotations") or {}

    def __contains__(self, name: str) -> bool:
        return name in self._caches

    def changes(self, name: str) -> bool:
        """Whether a transform has changed what an output carries."""
        return name in self._changed

    def of(self, name: str) -> tuple[str, Mapping[str, Any]] | None:
        """The rotation of an output, name and record."""
        rotation = self._caches.get(name)
        return None if rotation is None else (rotation, self._rotations.get(rotation, {}))


def float_output_names(model: ir.Model) -> list[str]:
    """The graph's float outputs, each once; those of an unknown type among them."""
    return list(
        dict.fromkeys(
            value.name or ""
            for value in model.graph.outputs
            if value.dtype in FLOATS or (value.dtype is None and isinstance(value.type, ir.TensorType | None))
        )
    )
