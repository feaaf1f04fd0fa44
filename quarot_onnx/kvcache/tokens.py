"""Scales of tokens for GroupQueryAttention: rows of bytes in the graph, float in the operator.

The operator's own cache of integers has fixed scales. Here it keeps none; a cache is uint8 [batch, KV heads,
positions, bytes], of each head of a token its integers and behind them the bytes of its scales (:mod:`.codec`), so that
whoever holds one tensor for keys and one for values, as onnxruntime-genai does, holds scales, too::

    past ──┬── values ─────────────────────────────┐
    K, V ──│── bytes ──┬── values ─────────────────┴── GroupQueryAttention
           └───────────┴── rows ── present

What is new is read rounded: a prefill computes what decoding it would. The rows of the present are those that the
operator would put out: what is new stands behind the tokens of its own row of the batch, which may be fewer than the
past has positions; and a past that is a buffer, longer than all tokens, keeps its length. A prefix in the graph stays
in float, in front of the past, or of what is new at a first prompt (:mod:`quarot_onnx.prefix.fused`).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from quarot_onnx.emission.activation import ActivationWriter
from quarot_onnx.emission.writer import Writer
from quarot_onnx.graph.query import consumers, data_input
from quarot_onnx.kvcache.codec import FourBits, HeadGrid, InTwoBytes
from quarot_onnx.kvcache.fed import fed_tokens, fresh_tokens, prefix_length, total_tokens
from quarot_onnx.kvcache.places import Cache, FusedPlace, retype
from quarot_onnx.rotation.rope import SEQLENS, TOTAL, RopeSplitter

SCALE_BYTES = 2 * InTwoBytes.entries
"""Of a head of a token, a scale for each half."""

_END = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class _Rows:
    """Which rows the present takes.

    Attributes:
        fresh: How many tokens of a prefix are fed before the caller's, [1]; None without a prefix.
        places: Where each is found in the past and what is new behind it, [batch, heads, positions, 1].
    """

    fresh: ir.Value | None
    places: ir.Value


class TokenCache:
    """Rewrites GroupQueryAttentions of one graph."""

    def __init__(self, model: ir.Model) -> None:
        """Write into ``model``."""
        self._writer = Writer(model)
        self._ropes, self._activations = RopeSplitter(self._writer.editor), ActivationWriter(self._writer)
        self._order = {node: number for number, node in enumerate(model.graph)}
        self._rows: dict[tuple[ir.Value, ir.Value, int, int], _Rows] = {}

    @cached_property
    def _code(self) -> InTwoBytes:
        """One table for all."""
        return InTwoBytes(self._writer)

    def write(self, place: FusedPlace, keys: HeadGrid, values: HeadGrid) -> None:
        """Let one operator's caches be bytes; nodes are few, as each takes its time: K and V go through them together.

        Args:
            place: The operator; its head_dim is even.
            keys: The grid of keys.
            values: The grid of values.

        Raises:
            ModelError: What stands between the operator and its caches is no prefix.
        """
        self._ropes.split(place.attention)
        node, heads, head_dim = place.node, place.attention.num_kv_heads, place.attention.head_dim
        add, ints, caches = self._writer.add, self._writer.ints, (place.keys, place.values)
        width = head_dim // 2 + SCALE_BYTES
        grids = (keys,) if keys == values else (*(keys for _ in range(heads)), *(values for _ in range(heads)))
        codec = FourBits(self._writer, self._code, grids, head_dim)
        self._read_past(caches, codec, width)
        rows = self._present_rows(place)
        fed = add(node, "Concat", data_input(node, 1), data_input(node, 2), axis=-1)
        fed = self._activations.as_float(node, fed, self._dtype(place.keys))
        x = add(node, "Reshape", fed, ints(0, 0, 2 * heads, head_dim))
        x = add(node, "Transpose", x, perm=[0, 2, 1, 3])
        kept = codec.kept(node, x if rows.fresh is None else add(node, "Slice", x, rows.fresh, ints(_END), ints(2)))
        assert kept.scales is not None, "none are fixed"
        integers = add(node, "Cast", kept.integers, to=int(ir.DataType.UINT8))
        new = self._apart(node, add(node, "Concat", integers, kept.scales, axis=-1), heads, 1)
        rounded = codec.rounded(node, kept)
        if rows.fresh is not None:
            prefix = add(node, "Slice", x, ints(0), rows.fresh, ints(2))
            rounded = add(node, "Concat", prefix, rounded, axis=2)
        packed = add(node, "Reshape", add(node, "Transpose", rounded, perm=[0, 2, 1, 3]), ints(0, 0, -1))
        packed = self._writer.cast(node, packed, ir.DataType.FLOAT, self._dtype(place.keys))
        for index, real in enumerate(self._apart(node, packed, heads * head_dim, 2)):
            node.replace_input_with(1 + index, real)
        for cache, own in zip(caches, new, strict=True):
            every = add(node, "Concat", cache.past, own, axis=2)
            present = add(node, "GatherND", every, rows.places, batch_dims=2)
            self._writer.editor.take_over(cache.present, present)
            self._writer.editor.prune(cache.present)
            for value in (cache.past, present):
                retype(value, ir.DataType.UINT8, width)

    def _read_past(self, caches: tuple[Cache, ...], codec: FourBits, width: int) -> None:
        """Let all users of pasts of keys and values see what the bytes stand for."""
        add, ints, number = self._writer.add, self._writer.ints, self._order.__getitem__
        users = [consumers(cache.past) for cache in caches]
        first = min((user for each in users for user, _ in each), key=number)
        both = add(first, "Concat", *(cache.past for cache in caches), axis=1)
        middle = ints(width - SCALE_BYTES)
        integers = add(first, "Slice", both, ints(0), middle, ints(3))
        scales = add(first, "Slice", both, middle, ints(width), ints(3))
        real = codec.values(first, integers, scales)
        real = self._writer.cast(first, real, ir.DataType.FLOAT, self._dtype(caches[0]))
        heads = caches[0].attention.num_kv_heads
        for each, own in zip(users, self._apart(first, real, heads, 1), strict=True):
            for user, at in each:
                user.replace_input_with(at, own)

    def _apart(self, anchor: ir.Node, both: ir.Value, size: int, axis: int) -> list[ir.Value]:
        """What is keys' and what is values', ``size`` of an axis each."""
        editor = self._writer.editor
        attributes = [ir.AttrInt64("axis", axis)]
        made = editor.node(
            "Split", [both, self._writer.ints(size, size)], f"{anchor.name}/Split", outputs=2, attributes=attributes
        )
        editor.before(anchor, [made])
        return list(made.outputs)

    def _dtype(self, cache: Cache) -> ir.DataType:
        """Of a cache in float."""
        assert cache.past.dtype is not None, "a cache has a type"
        return cache.past.dtype

    def _present_rows(self, place: FusedPlace) -> _Rows:
        """Which rows the presents of an operator take; the same for all that are told the same lengths."""
        node, heads = place.node, place.attention.num_kv_heads
        prefix = prefix_length(place, "tokens cannot have scales of their own; use fixed ones")
        key = (data_input(node, SEQLENS), data_input(node, TOTAL), heads, prefix)
        if key not in self._rows:
            self._rows[key] = self._find_rows(node, place.keys.past, heads, prefix)
        return self._rows[key]

    def _find_rows(self, node: ir.Node, past: ir.Value, heads: int, prefix: int) -> _Rows:
        def add(op_type: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
            return self._writer.add(node, op_type, *inputs, **attributes)

        ints = self._writer.ints
        scalar = self._writer.constant("number", np.array(0, np.int64))
        one = self._writer.constant("number", np.array(1, np.int64))
        fed = fed_tokens(self._writer, node)
        held = add("Gather", add("Shape", past), ints(2), axis=0)
        total = total_tokens(self._writer, node)
        last = add("Reshape", add("Cast", data_input(node, SEQLENS), to=int(ir.DataType.INT64)), ints(-1, 1))
        before = add("Max", add("Sub", add("Add", last, ints(1 - prefix)), fed), ints(0))  # tokens of each row's own
        fresh = None
        if prefix:
            fresh = fresh_tokens(self._writer, node, fed, total, prefix)
            fed, total = add("Sub", fed, fresh), add("Sub", total, ints(prefix))
        length = add("Reshape", add("Max", total, held), ints())
        position = add("Range", scalar, length, one)
        behind = add("Sub", position, before)
        new = add("And", add("Less", behind, fed), add("Less", ints(-1), behind))
        end = add("Sub", add("Add", held, fed), ints(1))
        place = add("Where", new, add("Add", held, behind), add("Min", position, end))
        apart = add("Unsqueeze", place, ints(1, 3))
        return _Rows(fresh, add("Expand", apart, ints(1, heads, 1, 1)))
