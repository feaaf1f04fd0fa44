"""The recipe that an earlier run wrote into a model, read back."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from quarot_onnx.errors import ModelError

RECIPE_KEY = "quarot_onnx.recipe"
"""The entry of an output's metadata_props that says what was done, as JSON."""


def recorded(model: ir.Model) -> Mapping[str, object] | None:
    """The recipe that an earlier run wrote into the model, or None.

    Raises:
        ModelError: The entry is there and is no JSON object.
    """
    text = model.metadata_props.get(RECIPE_KEY)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ModelError(f"the model's metadata entry {RECIPE_KEY} is damaged: {error}; export it anew") from error
    if not isinstance(found, dict):
        raise ModelError(f"the model's metadata entry {RECIPE_KEY} is no JSON object; export it anew")
    return found


SINK_PREFIX = "sink_prefix"
"""The name of the transform that gives a model a prefix."""


def prefix_of(recipe: Mapping[str, object] | None) -> tuple[str, tuple[int, ...]] | None:
    """The sink prefix that a recipe tells of: where it is kept, and its tokens; None for none."""
    for entry in transforms_of(recipe):
        if entry.get("name") == SINK_PREFIX:
            config = entry["config"]
            return str(config["form"]), tuple(config["ids"])
    return None


def refuse_prefixed(model: ir.Model, what: str) -> None:
    """Refuse to change the weights or the prefix of a model that has one: what it holds was computed with them.

    Raises:
        ModelError: It has.
    """
    found = prefix_of(recorded(model))
    if found is not None:
        raise ModelError(
            f"the model has the sink prefix {list(found[1])}, so it cannot be {what} any more: start from the original"
        )


def transforms_of(recipe: Mapping[str, object] | None) -> Sequence[Mapping[str, Any]]:
    """What a recipe says was done to the float model after its rotation, in order: name, places, caches, config."""
    found = (recipe or {}).get("transforms")
    return found if isinstance(found, list) else ()
