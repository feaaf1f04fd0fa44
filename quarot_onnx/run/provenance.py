"""The recipe: what was done to a model, written into it as JSON.

::

    {"version": "0.1.0",
     "rotation": {"counts": {"R1": 61, ...}, "rotations": {"R1": {..., "seed": 0}, ...}, "notes": [...]},
     "transforms": [{"name": "smooth_quant", "places": 90, "caches": ["present.0.value", ...], "config": {...}}],
     "quantization": {"config": {...}, "linears": 211, "embeddings": 0}}

It lies in the model's metadata_props under ``RECIPE_KEY`` and, with the proof of the rotation and a list of what was
written beside the model (see ``replacing``), in ``.quarot.json`` there.
"""

import json
from collections.abc import Collection, Mapping
from importlib.metadata import version

import onnx_ir as ir

from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import AlgoConfig, QuarotConfig
from quarot_onnx.errors import ConfigError, ModelError
from quarot_onnx.graph.metadata import RECIPE_KEY, recorded, transforms_of
from quarot_onnx.quantization.select import Selection
from quarot_onnx.rotation.plan import Plan
from quarot_onnx.sites.detect import is_quantized as has_quantized_operators
from quarot_onnx.sites.model import Kind

__all__ = [
    "RECIPE_KEY",
    "Record",
    "counts_of",
    "is_quantized",
    "is_rotated",
    "make_recipe",
    "record",
    "recorded",
    "refuse_other_rotation",
    "refuse_quantized",
    "rotation_notes",
    "summary",
]

Record = Mapping[str, object]


def make_recipe(
    *,
    rotation: tuple[Plan, QuarotConfig] | None = None,
    earlier: Record | None = None,
    transform: tuple[Plan, AlgoConfig] | None = None,
    quantization: tuple[QConfig, Selection] | None = None,
) -> dict[str, object]:
    """What was done, JSON types only.

    Args:
        rotation: The rotations of this run, and what was asked for.
        earlier: The recipe of what this step starts from, whose rotation and transforms live on.
        transform: What was done to the float model after its rotation, and what was asked for.
        quantization: What this run quantized.
    """
    recipe: dict[str, object] = {"version": version("quarot-onnx")}
    if rotation is not None:
        plan, asked = rotation
        recipe["rotation"] = plan.record() | {"config": asked.to_dict()}
    for step in ("rotation", "transforms"):
        if earlier is not None and earlier.get(step) is not None:
            recipe[step] = earlier[step]
    if transform is not None:
        done, wanted = transform
        entry = {"name": wanted.name, **done.counts, "caches": sorted(done.caches), "config": wanted.to_dict()}
        recipe["transforms"] = [*transforms_of(earlier), entry]
    if quantization is not None:
        config, selection = quantization
        recipe["quantization"] = {
            "config": config.to_dict(),
            "linears": len(selection.linears),
            "embeddings": len(selection.tables),
        }
    return recipe


def record(model: ir.Model, recipe: Record) -> None:
    """Write a recipe into the model's metadata."""
    model.metadata_props[RECIPE_KEY] = json.dumps(recipe)


def is_rotated(recipe: Record | None) -> bool:
    """Whether a recipe tells of a rotation."""
    return recipe is not None and recipe.get("rotation") is not None


def is_quantized(model: ir.Model) -> bool:
    """Whether a model was quantized, by this tool (also where its graph is a float one) or by another."""
    return (recorded(model) or {}).get("quantization") is not None or has_quantized_operators(model.graph)


def refuse_quantized(recipe: Record | None) -> None:
    """Refuse a model that an earlier run quantized, also where its graph is a float one (the format fake).

    Raises:
        ModelError: It was.
    """
    if recipe is not None and recipe.get("quantization") is not None:
        raise ModelError(
            "the model is already quantized, as its recipe says; start from the float32 or float16 export, or from the "
            "rotated float model"
        )


def refuse_other_rotation(recipe: Record, config: QuarotConfig) -> None:
    """Refuse a configuration that contradicts how a model was rotated.

    What the configuration leaves open contradicts nothing.

    Args:
        recipe: Of a rotated model.
        config: What is asked for now.

    Raises:
        ConfigError: A rotation is in one and not in the other, or was done in another way.
    """
    rotation = recipe.get("rotation")
    assert isinstance(rotation, dict), "only a rotated model comes here"
    counts, before, now = counts_of(recipe), dict(rotation.get("config", {})), config.to_dict()
    # The size that was asked for may have been left to the graph; the one that was taken is known.
    before["r_matrix_dim"] = rotation.get("rotations", {}).get("R1", {}).get("size", before.get("r_matrix_dim"))
    for kind in ("R1", "R2", "R3", "R4"):
        asked, done = now.pop(kind.lower()), bool(counts.get(kind))
        if asked is not None and asked != done:
            online = " (online_rotate)" if kind == "R4" else ""
            raise ConfigError(
                f"the model was rotated {'with' if done else 'without'} {kind} ({summary(recipe)}), and "
                f"the configuration asks for {kind.lower()}={asked}{online}; make them agree, or rotate anew"
            )
    for name in sorted(config.model_fields_set & now.keys()):
        asked = now[name]
        if asked is not None and asked != before.get(name):
            raise ConfigError(
                f"the model was rotated with {name}={before.get(name)}, and the configuration asks for {name}={asked}; "
                "rotate the original anew, or make the two agree"
            )


def rotation_notes(recipe: Record | None, wanted: Collection[Kind]) -> tuple[str, ...]:
    """What a user should know of a rotated model that is quantized as it is.

    Args:
        recipe: Of the model; without one, or one that tells of no rotation, there is nothing to say.
        wanted: The rotations that the scheme gains from.
    """
    if recipe is None or not is_rotated(recipe):
        return ()
    done, since = counts_of(recipe), {entry.get("name") for entry in transforms_of(recipe)}
    if Kind.R3 in wanted and not done.get("R3") and "kv_cache" not in since:
        return ("the model was rotated without R3, which quantized keys gain from: rotate the original with r3",)
    if Kind.R4 in wanted and not done.get("R4") and "smooth_quant" not in since:
        return ("the model was rotated without R4, which quantized activations gain from: rotate the original with r4",)
    if Kind.R4 not in wanted and done.get("R4"):
        return ("the model was rotated with R4, which costs time at every step and gains little for weights alone",)
    return ()


def summary(recipe: Record) -> str:
    """A recipe's rotation in a few words."""
    return ", ".join(f"{kind} at {count} places" for kind, count in counts_of(recipe).items())


def counts_of(recipe: Record) -> Mapping[str, int]:
    """The number of places of each rotation."""
    rotation = recipe.get("rotation")
    return rotation.get("counts", {}) if isinstance(rotation, dict) else {}
