"""Second moments of queries and keys behind RoPE, head by head, over calibration samples."""

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.fetching import Fetched, Taker
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
from quarot_onnx.sites.scores import same_when_raised

_Heads = NDArray[np.float32]

_QUERIES = 512
"""Queries of a run whose attention is looked at."""

_ALIKE = 0.05
"""By how much the length of keys may change where a sample is moved: cosines of late positions are inexact in float16.

Where it is more, the graph uses its positions for something else than RoPE, and samples stay where they are."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Of one attention, per head.

    Attributes:
        queries: E[qᵀq], [query heads, head_dim, head_dim].
        keys: E[(k - c)ᵀ(k - c)], keys weighted by how much attention hangs on them, [KV heads, head_dim, head_dim].
        centres: c, their mean, [KV heads, head_dim]; None where scores may not be raised, and keys stay where they are.
    """

    queries: NDArray[np.float64]
    keys: NDArray[np.float64]
    centres: NDArray[np.float64] | None


class _Side:
    """Takes the queries or the keys of an attention, [batch, heads, seq, head_dim], and hands them on in pairs."""

    def __init__(self, waiting: deque[_Heads], meet: Callable[[], None]) -> None:
        self._waiting, self._meet = waiting, meet

    def add(self, values: _Heads) -> bool:
        """Take in heads; False where a value is not finite."""
        self._waiting.append(values)
        finite = bool(np.isfinite(values).all())
        if finite:
            self._meet()
        return finite


class _Sums:
    """What is summed up of the queries and keys of an attention, run by run."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        self._queries, self._keys = deque[_Heads](), deque[_Heads]()
        self.of_queries, self.of_keys = (_Side(waiting, self._meet) for waiting in (self._queries, self._keys))
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._queries.clear()
        self._keys.clear()
        self.queries, self.keys, self.first = (np.zeros((1,) * axes) for axes in (3, 3, 2))
        self.weights, self.count = np.zeros(1), 0

    def _meet(self) -> None:
        """Queries and keys of a run come one after the other, in either order, and runs in one order."""
        if not self._queries or not self._keys:
            return
        queries, keys = self._queries.popleft(), self._keys.popleft()
        known = self._attention
        fits = queries.shape[1] == known.num_heads and {queries.shape[3], keys.shape[3]} == {known.head_dim}
        if not fits or known.num_heads % keys.shape[1]:
            raise ModelError(
                f"{known.name}: the heads behind RoPE lie along another axis than the second, so keys "
                f"cannot be balanced; {UNBALANCED}"
            )
        for q, k in zip(queries, keys, strict=True):
            self.queries = self.queries + q.swapaxes(1, 2) @ q
            weights, exact = attended(q, k), k.astype(np.float64)
            weighted = exact * weights[:, :, None]
            self.keys = self.keys + weighted.swapaxes(1, 2) @ exact
            self.first, self.weights = self.first + weighted.sum(axis=1), self.weights + weights.sum(axis=1)
        self.count += queries.shape[0] * queries.shape[2]

    def moments(self, *, centred: bool) -> Moments:
        """What was found.

        Raises:
            CalibrationError: There was nothing.
        """
        if not self.count:
            raise CalibrationError(f"{self._attention.name} saw nothing in any sample: calibrate with longer samples")
        whole = np.maximum(self.weights, np.finfo(np.float64).tiny)[:, None]
        keys, centres = self.keys / whole[:, :, None], self.first / whole
        if centred:
            keys = keys - centres[:, :, None] * centres[:, None]
        return Moments(self.queries / self.count, keys, centres if centred else None)


def attended(queries: _Heads, keys: _Heads) -> NDArray[np.float64]:
    """How much attention hangs on each key: Σ p (1 - p) over queries, p = softmax(q kᵀ / √head_dim) over keys so far.

    It is the sum of the Softmax's derivatives by the key's scores. The scale is the usual one, whatever the graph has:
    these are weights. Of long texts some of the queries are taken.

    Args:
        queries: [query heads, seq, head_dim].
        keys: [KV heads, seq, head_dim].

    Returns:
        Of the query heads of each KV head together, [KV heads, seq].
    """
    groups, length = len(queries) // len(keys), keys.shape[1]
    rows = np.arange(0, queries.shape[1], -(-queries.shape[1] // _QUERIES))
    behind = rows[:, None] < np.arange(length) if queries.shape[1] == length else np.zeros((1, 1), bool)
    found = np.zeros((len(keys), length))
    for head, query in enumerate(queries[:, rows]):
        scores = query @ keys[head // groups].T / np.float32(math.sqrt(keys.shape[2]))
        scores[np.broadcast_to(behind, scores.shape)] = -np.inf
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        found[head // groups] += (shares * (1 - shares)).sum(axis=0)
    return found


@dataclass(frozen=True, eq=False)
class _Place:
    """Where one attention's heads are seen.

    Attributes:
        attention: It.
        query: The name of a value, [batch, heads, seq, head_dim] or packed [batch, seq, heads · head_dim].
        key: The same of keys.
        sums: What is summed up there.
        centred: Whether keys may be centred.
    """

    attention: Attention
    query: str
    key: str
    sums: _Sums
    centred: bool


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
    """Whether the heads of queries and keys lie where they are looked for, by what is known of their shapes."""
    heads = attention.heads
    assert heads is not None, "a place of R3"
    if heads.fused is not None:
        return True
    lie = partial(_lie, {attention.num_heads, attention.num_kv_heads}, attention.head_dim)
    return all(value is not None and lie(shapes.of(value)) for value in (heads.query, heads.key))


def _lie(counts: Collection[int], head_dim: int, shape: Sequence[int | None] | None) -> bool:
    """Whether a shape may be [batch, heads, seq, head_dim], or [batch, seq, heads · head_dim]."""
    if shape is None:
        return False
    if len(shape) == HEADS_PACKED:
        return (shape[2] or 0) % head_dim == 0
    if len(shape) != HEADS_APART or shape[3] not in {None, head_dim}:
        return False
    return shape[1] in counts or (shape[1] is None and shape[2] not in counts)


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
    takers = dict[str, Taker]()
    for place in places:
        takers |= {place.query: place.sums.of_queries, place.key: place.sums.of_keys}
    widths = {name: place.attention.head_dim for place in places for name in (place.query, place.key)}
    shifts = Shifts.into(model, derived, positions)

    def counted(sample: Sample, values: NDArray[Any], name: str) -> list[NDArray[Any]]:
        if values.ndim == HEADS_PACKED:
            values = values.reshape(*values.shape[:2], -1, widths[name]).swapaxes(1, 2)
        return sample.heads(values, name)

    def observe(feeds: Sequence[Feeds], told: Progress | None = None) -> float:
        """Look at samples and at nothing that was before; Σ|k|² of keys by their weights."""
        for place in places:
            place.sums.clear()
        observe_samples(
            Fetched(takers, counted=counted), model, SampleReader(list(feeds)), progress=told, memory=memory
        )
        return float(sum(np.trace(place.sums.keys, axis1=1, axis2=2).sum() for place in places))

    room = shifts.room(samples[0])
    if room:
        as_it_is = observe([shifts.moved(samples[0], 0)])
        try:
            moved = observe([shifts.moved(samples[0], room)])
        except CalibrationError:
            if positions is not None:
                raise
            moved = math.inf  # a table ends that was not found
        if abs(moved - as_it_is) > _ALIKE * as_it_is:
            shifts = replace(shifts, positions=0)
    observe(shifts.all(samples), progress)
    return {place.attention.name: place.sums.moments(centred=place.centred) for place in places}


def _places(model: ir.Model, attentions: Sequence[Attention]) -> tuple[list[_Place], list[ir.Value]]:
    """Where heads are seen behind RoPE, which is taken out of fused operators; and the positions made for that."""
    ropes, nodes, shapes = RopeSplitter(Editor(model)), {label(node): node for node in model.graph}, Shapes(model)
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
        centred = same_when_raised(nodes[attention.name], shapes)
        places.append(_Place(attention, query.name or "", key.name or "", _Sums(attention), centred))
    return places, derived
