"""The prefix put into a graph: the caller feeds what comes after it, and sees no more than before.

The prefix stands at positions 0 to p - 1. Its keys and values are constants of the graph; every attention reads them
before what the caller brings, whose positions are counted from p. Inputs, outputs and caches keep their meaning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.observing import observing_session
from quarot_onnx.errors import FeedError, ModelError
from quarot_onnx.graph.edit import Editor
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.prefix.covered import require_all
from quarot_onnx.prefix.fused import FusedPlace, GroupQueryPlace, fused_place
from quarot_onnx.prefix.graft import Graft, forget_shape
from quarot_onnx.prefix.pads import Pads, find_pads
from quarot_onnx.prefix.positions import find_positions, shift_positions
from quarot_onnx.prefix.spelt import SpeltPlace, spelt_place
from quarot_onnx.sites.attention import FUSED
from quarot_onnx.sites.model import Attention

Place = GroupQueryPlace | FusedPlace | SpeltPlace


@dataclass(frozen=True, eq=False)
class Places:
    """Where a prefix goes in a graph.

    Attributes:
        attentions: Each attention.
        positions: Where positions are read.
        pads: What becomes of pads before a row's text.
        inputs: What the graph is fed.
        shapes: Inferred shapes.
    """

    attentions: tuple[Place, ...]
    positions: tuple[tuple[ir.Node, int], ...]
    pads: Pads
    inputs: ModelInputs
    shapes: Shapes


def find_prefix_places(model: ir.Model, attentions: Sequence[Attention], folder: Path) -> Places:
    """Where a prefix goes.

    Args:
        model: The float model.
        attentions: All of its attentions.
        folder: Where the exporter's config files lie.

    Raises:
        ModelError: There is no room for one, or something attends that would not read it; says why.
    """
    shapes, inputs = Shapes(model), inputs_alone(model, folder)
    if not attentions:
        raise ModelError("no attention was found, so there is nothing that could attend to a prefix")
    try:
        require_all(model.graph, attentions)
        places = tuple(
            fused_place(a, shapes) if (a.node.domain, a.node.op_type) in FUSED else spelt_place(a.node, shapes)
            for a in attentions
        )
        positions = find_positions(model.graph, dict(inputs.roles), shapes)
    except ModelError as error:
        way = "feed it as a cache (--prefix npz)" if inputs.has_cache else "export with a cache, and feed it as one"
        raise ModelError(f"no prefix fits into this graph: {error}; {way}, or go without") from error
    return Places(places, positions, find_pads(model.graph, positions, inputs, shapes), inputs, shapes)


def inputs_alone(model: ir.Model, folder: Path) -> ModelInputs:
    """What a graph is fed; one through which a prefix cannot be run alone is refused, wherever it is kept then.

    A cache of fixed length comes out of that run at its full length, whatever of it is the prefix's.

    Args:
        model: The model.
        folder: Where the exporter's config files lie.

    Raises:
        FeedError: An input, or the layout of a cache, is not known.
        ModelError: It takes no token ids, or fixes how many it takes or how many positions its cache has.
    """
    try:
        inputs = ModelInputs.from_model(model, folder=folder)
    except FeedError as error:
        raise FeedError(error.reason, "go without a prefix") from error
    if not inputs.takes_ids:
        raise ModelError("a prefix needs a graph that takes token ids")
    way = "export with a free length (quantize --prefix graph --fix-shape fixes it in the end)"
    if inputs.lengths.seq is not None:
        raise ModelError(
            f"the graph takes {inputs.lengths.seq} tokens at a time, so that a prefix cannot be run alone: {way}"
        )
    if inputs.lengths.past:
        raise ModelError(
            f"the graph fixes its cache at {inputs.lengths.past} positions, so that a prefix cannot be run alone: {way}"
        )
    return inputs


def counts_pads(model: ir.Model, inputs: ModelInputs) -> bool:
    """Whether pads before a row's text stand between it and a prefix that is fed as a cache."""
    shapes = Shapes(model)
    try:
        positions = find_positions(model.graph, dict(inputs.roles), shapes)
    except ModelError:  # no RoPE, or one that is not understood
        return False
    return find_pads(model.graph, positions, inputs, shapes).counted


def attach(model: ir.Model, places: Places, ids: Sequence[int]) -> None:
    """Put a prefix into ``model``.

    Args:
        model: The float model that the places were found in; its weights lie in files.
        places: From `find_prefix_places`.
        ids: The tokens.
    """
    wanted = [value for place in places.attentions for value in place.wanted]
    seen = _run(model, wanted, places.inputs, ids)
    editor = Editor(model)
    tokens = next(value for value in model.graph.inputs if value.name == places.inputs.tokens)
    graft = Graft(editor, tokens, len(ids))
    shift_positions(graft, places.positions, places.shapes, places.pads.mask)
    for value in places.pads.rows if places.pads.mask is not None else ():
        forget_shape(value)
    for place in places.attentions:
        place.attach(graft, seen)


def _run(
    model: ir.Model, wanted: Sequence[ir.Value], inputs: ModelInputs, ids: Sequence[int]
) -> dict[str, NDArray[Any]]:
    """The values of a run of the prefix alone, by name."""
    names = list(dict.fromkeys(value.name or "" for value in wanted))
    session = observing_session(model, names, (None,), None)
    outputs = session.run(None, inputs.feed(np.array([ids], np.int64)))
    return dict(zip(names, outputs, strict=True))
