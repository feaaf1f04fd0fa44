"""Where keys and values join what a cache holds of them: the places at which they become integers.

Spelt out, in the layout [batch, heads, positions, head_dim]::

    past ── Concat(past, new) ──┬── attention
                                └── present

Fused: an operator that takes the past and what is new, and gives the present.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from quarot_onnx.errors import ModelError, first_and_more
from quarot_onnx.graph.caches import FUSED_CACHES, presents
from quarot_onnx.graph.query import attribute_int, data_users, first_reader, label
from quarot_onnx.sites.detect import Survey
from quarot_onnx.sites.integer_caches import integer_cache
from quarot_onnx.sites.model import Attention
from quarot_onnx.sites.pasts import KEY, VALUE, past_inputs

ODD = (
    "its cache is no input [batch, heads, positions, head_dim] that is joined with what is new and leaves the graph "
    "again"
)
UNREAD = "no attention that is understood reads, unchanged, the cache that it takes"
_ALONG = frozenset({"Concat", "Slice", "Expand"})
"""What may stand between an operator and its cache: a prefix is put in front, and taken off again."""

_RANK, _POSITIONS = 4, 2
"""Of a cache."""


@dataclass(frozen=True, eq=False)
class Cache:
    """A cache of keys or of values.

    Attributes:
        keys: Whether it is K, else V.
        attention: Who reads it.
        past: The input of the graph.
        present: The output of the graph.
    """

    keys: bool
    attention: Attention
    past: ir.Value
    present: ir.Value


@dataclass(frozen=True, eq=False)
class JoinedPlace(Cache):
    """A past that a Concat joins with what is new.

    Attributes:
        concat: The node; its second input is what is new.
    """

    concat: ir.Node


@dataclass(frozen=True, eq=False)
class FusedPlace:
    """An operator's own cache.

    Attributes:
        keys: Of keys.
        values: Of values.
    """

    keys: Cache
    values: Cache

    @property
    def attention(self) -> Attention:
        """The operator."""
        return self.keys.attention

    @property
    def node(self) -> ir.Node:
        """The operator's node."""
        return self.attention.node


@dataclass(frozen=True, eq=False)
class CachePlaces:
    """All of a graph.

    Attributes:
        joined: Those that are spelt out.
        fused: Those of operators.
        odd: The nodes of attentions whose caches are not understood, and stay in float beside those that are.
        unread: The nodes that read caches which no attention is seen to read, and which stay in float, too.
        bytes_left: What all that stays in float takes for a position, as far as shapes tell.
    """

    joined: tuple[JoinedPlace, ...]
    fused: tuple[FusedPlace, ...]
    odd: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    bytes_left: int = 0

    @property
    def caches(self) -> tuple[Cache, ...]:
        """All caches."""
        return (*self.joined, *(cache for place in self.fused for cache in (place.keys, place.values)))


def find_cache_places(survey: Survey) -> CachePlaces:
    """The places of a float model.

    Raises:
        ModelError: It has no cache, one of integers already, or none that is joined in a way that is understood; or
            operators keep some, and another is not understood: onnxruntime-genai knows one type for all; or keys and
            values have heads of different sizes.
    """
    caches = presents(survey.model.graph)
    found = integer_cache(survey.model.graph)
    if found is not None:
        raise ModelError(
            f"the key/value cache is quantized already ({found}): start from the export whose cache is float, or leave "
            "the cache as it is"
        )
    places, pasts = _looked_at(survey, caches)
    unread = [past for past in caches if past not in pasts]
    _require_some(places, [past for past in unread if position_bytes(past, caches[past][0])])
    _require_alike(places.joined)
    quantized = {cache.past for cache in places.caches}
    bytes_left = sum(position_bytes(past, values[0]) for past, values in caches.items() if past not in quantized)
    return replace(places, unread=tuple(map(first_reader, unread)), bytes_left=bytes_left)


def _looked_at(
    survey: Survey, caches: dict[ir.Value, tuple[ir.Value, ...]]
) -> tuple[CachePlaces, Collection[ir.Value]]:
    """What the attentions that were found keep, and all pasts that they read."""
    joined: dict[ir.Value, JoinedPlace] = {}
    fused: list[FusedPlace] = []
    strange: list[str] = []
    seen: set[ir.Value] = set()
    for attention in survey.visible().attentions:
        pasts = {True: past_inputs(attention.node, KEY), False: past_inputs(attention.node, VALUE)}
        if not any(pasts.values()):
            continue
        seen.update(*pasts.values())
        spelt = [_joined(keys, attention, past, caches) for keys, found in pasts.items() for past in found]
        if not (attention.head_dim and attention.num_kv_heads):
            strange.append(label(attention.node))
        elif all(spelt):
            joined |= {place.past: place for place in spelt if place is not None and place.past not in joined}
        elif (place := _fused(attention, pasts, caches)) is None:
            strange.append(label(attention.node))
        else:
            fused.append(place)
    return CachePlaces(tuple(joined.values()), tuple(fused), tuple(strange)), seen


def _require_some(places: CachePlaces, unread: Sequence[ir.Value]) -> None:
    """Refuse a graph without a cache that can be quantized, and one that keeps another beside those of operators.

    Raises:
        ModelError: It is such a graph.
    """
    fused = places.fused
    if (places.odd or unread) and (fused or not places.joined):
        beside = f", and {label(fused[0].node)} keeps its own, all of which have one type" if fused else ""
        names, why = (places.odd, ODD) if places.odd else ([*map(first_reader, unread)], UNREAD)
        raise ModelError(
            f"{first_and_more(names)}: {why}, so it cannot be quantized{beside}; leave the cache in float, or export "
            "the model so that all layers keep their caches alike"
        )
    if not places.joined and not fused:
        raise ModelError(
            "the graph has no key/value cache, so there is none to quantize: export it with one (optimum: --task "
            "text-generation-with-past), or leave the cache in float"
        )


def position_bytes(past: ir.Value, present: ir.Value) -> int:
    """The bytes of a cache for each position; 0 where its shape shows no axis along which it grows, or several.

    Args:
        past: The input of the graph.
        present: The output that carries it on.
    """
    assert past.dtype is not None, "a cache has a type"
    pairs = list(zip(past.shape or (), present.shape or (), strict=False))[1:]  # the first is that of rows
    fixed = [own for own, other in pairs if isinstance(own, int) and own == other]
    return int(math.prod(fixed) * past.dtype.itemsize) if len(fixed) == len(pairs) - 1 else 0


def _require_alike(places: Iterable[JoinedPlace]) -> None:
    """Refuse keys and values of different sizes, as those of latent attention are: one head_dim is taken for both.

    Raises:
        ModelError: They are.
    """
    for place in places:
        width, own = place.past.shape and place.past.shape[-1], place.attention.head_dim
        if isinstance(width, int) and width != own:
            raise ModelError(
                f"{label(place.attention.node)}: its cache {place.past.name!r} holds heads of {width} and its values "
                f"are of {own}: caches of keys and values of different sizes cannot be quantized; leave the cache in "
                "float"
            )


def _joined(
    keys: bool,
    attention: Attention,
    past: ir.Value,
    caches: dict[ir.Value, tuple[ir.Value, ...]],
) -> JoinedPlace | None:
    users = data_users(past)
    if len(users) != 1 or past not in caches or past.shape is None or len(past.shape) != _RANK:
        return None
    node, index = users[0]
    axis = attribute_int(node, "axis", 0)
    if node.op_type != "Concat" or index != 0 or len(node.inputs) != 2 or axis not in {_POSITIONS, _POSITIONS - _RANK}:
        return None
    present = node.outputs[0]
    if node.inputs[0] is not past or caches[past] != (present,):
        return None  # through a Cast, or put out twice
    return JoinedPlace(keys, attention, past, present, node)


def _fused(
    attention: Attention, pasts: dict[bool, list[ir.Value]], caches: dict[ir.Value, tuple[ir.Value, ...]]
) -> FusedPlace | None:
    """The place of an operator that keeps its cache itself."""
    if (attention.node.domain, attention.node.op_type) not in FUSED_CACHES:
        return None
    found = [
        Cache(keys, attention, values[0], caches[values[0]][0])
        for keys, values in pasts.items()
        if len(values) == 1 and len(caches.get(values[0], ())) == 1
    ]
    if len(found) != len(pasts) or not all(map(_plain, found)):
        return None
    return FusedPlace(*found)


def _plain(cache: Cache) -> bool:
    """Whether an operator's cache comes in and leaves as it is, but for a prefix."""
    node = cache.attention.node
    entry, out = next(
        (node.inputs[index], node.outputs[place])
        for index, place in FUSED_CACHES[node.domain, node.op_type].items()
        if place == (KEY if cache.keys else VALUE)
    )
    queue = [entry]
    while queue:
        value = queue.pop()
        maker = None if value is None else value.producer()
        if maker is not None and maker.op_type in _ALONG:
            queue += maker.inputs if maker.op_type == "Concat" else maker.inputs[:1]
        elif maker is not None and maker.op_type != "Constant":
            return False
    leaves: ir.Value | None = cache.present
    while leaves is not None and leaves is not out:
        maker = leaves.producer()
        leaves = maker.inputs[0] if maker is not None and maker.op_type in _ALONG else None
    return leaves is out


def retype(value: ir.Value, dtype: ir.DataType, width: int) -> None:
    """A cache of another type and another last axis."""
    value.type = ir.TensorType(dtype)
    if value.shape is not None:
        value.shape = ir.Shape([*value.shape[:3], width])
