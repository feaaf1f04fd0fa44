"""Second moments of queries and keys behind RoPE, head by head, over calibration samples."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.fetching import Fetched
from quarot_onnx.calibration.observing import observe_samples
from quarot_onnx.calibration.padding import Sample
from quarot_onnx.calibration.readers import DataReader, SampleReader, wrap
from quarot_onnx.config.kv_cache import UNBALANCED
from quarot_onnx.errors import CalibrationError, ModelError
from quarot_onnx.graph.edit import Editor
from quarot_onnx.graph.query import data_input, label
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.io import model_io
from quarot_onnx.kvcache.shifting import Shifts
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.progress import Progress
from quarot_onnx.rotation.rope import ROPE, RopeSplitter
from quarot_onnx.sites.detect import Survey
from quarot_onnx.sites.feasible import feasible
from quarot_onnx.sites.model import HEADS_APART, HEADS_PACKED, Attention

_ALIKE = 0.05
"""By how much the length of keys may change where a sample is moved: cosines of late positions are inexact in float16.

Where it is more, the graph uses its positions for something else than RoPE, and samples stay where they are."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Of one attention, per head.

    Attributes:
        queries: E[qᵀq], [query heads, head_dim, head_dim].
        keys: E[kᵀk], [key heads, head_dim, head_dim].
    """

    queries: NDArray[np.float64]
    keys: NDArray[np.float64]


class _Taker:
    """Sums up heads [batch, heads, seq, head_dim]."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.squares, self.count = np.zeros((1, 1, 1)), 0

    def add(self, values: NDArray[np.float32]) -> bool:
        """Take in heads; False where a value is not finite."""
        for row in values:
            self.squares = self.squares + row.swapaxes(1, 2) @ row
        self.count += values.shape[0] * values.shape[2]
        return bool(np.isfinite(self.squares).all())


@dataclass(frozen=True, eq=False)
class _Place:
    """Where one attention's heads are seen.

    Attributes:
        attention: It.
        query: The name of a value, [batch, heads, seq, head_dim] or packed [batch, seq, heads · head_dim].
        key: The same of keys.
        of_queries: What is summed up there.
        of_keys: The same of keys.
    """

    attention: Attention
    query: str
    key: str
    of_queries: _Taker
    of_keys: _Taker

    def moments(self) -> Moments:
        """What was found.

        Raises:
            CalibrationError: There was nothing.
            ModelError: The second axis is not that of the heads.
        """
        queries, keys = self.of_queries, self.of_keys
        if not queries.count or not keys.count:
            raise CalibrationError(f"{self.attention.name} saw nothing in any sample: calibrate with longer samples")
        counts, widths = zip(queries.squares.shape[:2], keys.squares.shape[:2], strict=True)
        if counts[0] != self.attention.num_heads or counts[0] % counts[1] or {*widths} != {self.attention.head_dim}:
            raise ModelError(
                f"{self.attention.name}: the heads behind RoPE lie along another axis than the second, so keys "
                f"cannot be balanced; {UNBALANCED}"
            )
        return Moments(queries.squares / queries.count, keys.squares / keys.count)


def balanceable(survey: Survey) -> tuple[list[Attention], list[str]]:
    """The attentions whose heads can be told apart behind RoPE, and the names of those whose cannot."""
    found, others = list[Attention](), list[str]()
    places = {attention.node: attention for attention in feasible(survey.rotatable(), {}).r3}
    for seen in survey.visible().attentions:
        attention = places.get(seen.node)
        if attention is None or not _apart(attention, survey.shapes):
            others.append(seen.name)
        else:
            found.append(attention)
    return found, others


def _apart(attention: Attention, shapes: Shapes) -> bool:
    heads = attention.heads
    assert heads is not None, "a place of R3"
    if heads.fused is not None:
        return True
    for value in (heads.query, heads.key):
        shape = None if value is None else shapes.of(value)
        if shape is None or len(shape) not in {HEADS_APART, HEADS_PACKED} or (shape[-1] or 0) % attention.head_dim:
            return False
    return True


def collect_moments(
    file: str | Path,
    attentions: Sequence[Attention],
    reader: DataReader,
    positions: int | None,
    *,
    max_samples: int | None = None,
    progress: Progress | None = None,
    memory: Memory = WHOLE,
) -> dict[str, Moments]:
    """Moments of the attentions of a model, over all its positions.

    Args:
        file: The float model's file, with or without a prefix.
        attentions: From `balanceable`, of the model without it.
        reader: Calibration data.
        positions: How many the model has; None where that is not known.
        max_samples: Stop after so many samples; None for all.
        progress: Called after every sample.
        memory: Whether the model is run piece by piece.

    Returns:
        The attention's name to its moments.

    Raises:
        CalibrationError: As for ``collect_ranges``.
    """
    model, data = model_io.load(file), wrap(reader)
    data.rewind()
    data.require_sample()
    samples = list(islice(data, max_samples))
    places, derived = _places(model, attentions)
    takers = {place.query: place.of_queries for place in places} | {place.key: place.of_keys for place in places}
    widths = {name: place.attention.head_dim for place in places for name in (place.query, place.key)}
    shifts = Shifts.into(model, derived, positions)

    def counted(sample: Sample, values: NDArray[Any], name: str) -> NDArray[Any]:
        if values.ndim == HEADS_PACKED:
            values = values.reshape(*values.shape[:2], -1, widths[name]).swapaxes(1, 2)
        return sample.heads(values, name)

    def observe(feeds: Sequence[Feeds], told: Progress | None = None) -> float:
        """Look at samples and at nothing that was before; Σ|k|²."""
        for taker in takers.values():
            taker.clear()
        observe_samples(
            Fetched(takers, counted=counted), model, SampleReader(list(feeds)), progress=told, memory=memory
        )
        return float(sum(np.trace(place.of_keys.squares, axis1=1, axis2=2).sum() for place in places))

    room = shifts.room(samples[0])
    if room:
        as_it_is, moved = (observe([shifts.moved(samples[0], shift)]) for shift in (0, room))
        if abs(moved - as_it_is) > _ALIKE * as_it_is:
            shifts = replace(shifts, positions=0)
    observe(shifts.all(samples), progress)
    return {place.attention.name: place.moments() for place in places}


def _places(model: ir.Model, attentions: Sequence[Attention]) -> tuple[list[_Place], list[ir.Value]]:
    """Where heads are seen behind RoPE, which is taken out of fused operators; and the positions made for that."""
    ropes, nodes = RopeSplitter(Editor(model)), {label(node): node for node in model.graph}
    places, derived = list[_Place](), list[ir.Value]()
    for attention in attentions:
        heads = attention.heads
        assert heads is not None, "a place of R3"
        query, key = heads.query, heads.key
        if heads.fused is not None:
            split = ropes.split(replace(attention, node=nodes[attention.name]))
            query, key = split.query, split.key
            turns = [value.producer() for value in (query, key)]
            derived += [data_input(turn, 1) for turn in turns if turn is not None and turn.op_type == ROPE]
        assert query is not None
        assert key is not None
        places.append(_Place(attention, query.name or "", key.name or "", _Taker(), _Taker()))
    return places, derived
