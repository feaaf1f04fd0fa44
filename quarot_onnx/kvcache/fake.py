"""Keys and values rounded where they are new, and kept in float: what a cache of any bits would hold, for studies.

::

    K, V ── (scale, zero point of each head of a token, or of each group in it) ── rounded ── cache, attention

K is rounded after RoPE and R3, or before RoPE (`k_pre_rope`, as KVQuant does, Hooper et al. 2024, arXiv:2401.18079,
section 3.1). The grids are those of activations per token (:mod:`quarot_onnx.quantization.activations`). A prefix in
the graph is not rounded: where GroupQueryAttention is fed it as new tokens, they are cut off and joined again behind.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quarot_onnx.config.kv_cache import WHOLE_TOKEN, CacheGrid, KVCacheConfig
from quarot_onnx.emission.activation import ActivationWriter
from quarot_onnx.emission.writer import Writer
from quarot_onnx.errors import ModelError
from quarot_onnx.graph.query import attribute_int, consumers, data_input, label
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.kvcache.before_rope import before_rope
from quarot_onnx.kvcache.fed import behind_prefix, fed_tokens, fresh_tokens, prefix_length, total_tokens
from quarot_onnx.kvcache.places import CachePlaces, FusedPlace, JoinedPlace
from quarot_onnx.quantization.activations import FakePerToken
from quarot_onnx.rotation.rope import TOTAL, RopeSplitter

_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class _Kind:
    """What is rounded, and how: its grid, type, head_dim and rank.

    Of rank 4 it is [batch, heads, seq, head_dim], of rank 3 packed: [batch, seq, heads · head_dim].
    """

    grid: CacheGrid
    dtype: ir.DataType
    head_dim: int
    rank: int

    @property
    def apart(self) -> bool:
        """Whether heads have an axis of their own."""
        return self.rank == 4


class FakeCache:
    """Rounds keys and values of one graph."""

    def __init__(self, model: ir.Model, config: KVCacheConfig) -> None:
        """Write into ``model``."""
        self._config, self._writer, self._shapes = config, Writer(model), Shapes(model)
        self._activations = ActivationWriter(self._writer)
        self._ropes = RopeSplitter(self._writer.editor)
        self._prefixes: dict[tuple[ir.Value, int], ir.Value] = {}

    def write(self, places: CachePlaces) -> None:
        """Round at all places."""
        for joined in places.joined:
            if self._config.grid(keys=joined.keys).bits is not None:
                self._joined(joined)
        for fused in places.fused:
            self._fused(fused)

    def _joined(self, place: JoinedPlace) -> None:
        dtype = place.past.dtype
        assert dtype is not None, "a cache has a type"
        if place.keys and self._config.k_pre_rope:
            users = consumers(before_rope(data_input(place.concat, 1)))
        else:
            users = [(place.concat, 1)]
        self._round(users, _Kind(self._config.grid(keys=place.keys), dtype, place.attention.head_dim, 4))

    def _fused(self, place: FusedPlace) -> None:
        node, config, head_dim, dtype = place.node, self._config, place.attention.head_dim, place.keys.past.dtype
        assert dtype is not None, "a cache has a type"
        inside = attribute_int(node, "do_rotary", 0)
        grouped = node.op_type == "GroupQueryAttention"
        prefix = prefix_length(place, "it cannot be rounded; leave it in float") if grouped else 0
        if grouped and config.rotates_keys:
            self._ropes.split(place.attention)
        elif grouped:
            self._ropes.unpack(place.attention)
        elif node.inputs[1] is None or node.inputs[2] is None:
            raise ModelError(f"{label(node)} packs Q, K and V, so its cache cannot be rounded; leave it in float")
        fresh = self._fresh(node, prefix) if prefix else None
        if config.k_bits is not None and config.k_pre_rope and not inside:
            keys = data_input(node, 1)
            users = consumers(before_rope(behind_prefix(keys) if prefix else keys))
            self._round(users, _Kind(config.grid(keys=True), dtype, head_dim, self._rank(node, 1)))
        elif config.k_bits is not None:
            self._round([(node, 1)], _Kind(config.grid(keys=True), dtype, head_dim, self._rank(node, 1)), fresh)
        if config.v_bits is not None:
            self._round([(node, 2)], _Kind(config.grid(keys=False), dtype, head_dim, self._rank(node, 2)), fresh)

    def _fresh(self, node: ir.Node, prefix: int) -> ir.Value:
        """How many tokens of a prefix an operator is fed, [1]; the same for all that are told the same length."""
        key = (data_input(node, TOTAL), prefix)
        if key not in self._prefixes:
            fed, total = fed_tokens(self._writer, node), total_tokens(self._writer, node)
            self._prefixes[key] = fresh_tokens(self._writer, node, fed, total, prefix)
        return self._prefixes[key]

    def _rank(self, node: ir.Node, index: int) -> int:
        """Of K or V as a fused operator reads it."""
        if node.op_type == "GroupQueryAttention":
            return 3
        rank = self._shapes.rank(data_input(node, index))
        if rank is None:
            raise ModelError(f"{label(node)}: the axes of K and V are not known; leave its cache in float")
        return rank

    def _round(self, users: list[tuple[ir.Node, int]], kind: "_Kind", fresh: ir.Value | None = None) -> None:
        """Round what nodes read.

        Args:
            users: Nodes and the input of each, in graph order; all read one value.
            kind: What that is.
            fresh: How many tokens in front are a prefix, [1], packed; None where there is none.
        """
        (node, index), grid = users[0], kind.grid
        every, group = data_input(node, index), grid.group_size
        value = every if fresh is None else self._tokens(node, every, fresh, self._writer.ints(_END))
        together = group == WHOLE_TOKEN and kind.apart
        size = None if group == WHOLE_TOKEN or (group is None and kind.apart) else group or kind.head_dim
        assert grid.bits is not None, "or there is nothing to round"
        way = FakePerToken(grid.bits, grid.symmetric, size, grid.clip_ratio)
        rows = self._side_by_side(node, value) if together else value
        rounded, _ = self._activations.quantized(node, rows, kind.dtype, way)
        rounded = self._writer.cast(node, rounded, ir.DataType.FLOAT, kind.dtype)
        result = self._apart(node, rounded, value) if together else rounded
        if fresh is not None:
            prefix = self._tokens(node, every, self._writer.ints(0), fresh)
            result = self._writer.add(node, "Concat", prefix, result, axis=1)
        for user, place in users:
            user.replace_input_with(place, result)

    def _tokens(self, node: ir.Node, value: ir.Value, start: ir.Value, stop: ir.Value) -> ir.Value:
        """Some tokens of [batch, seq, heads · head_dim]."""
        return self._writer.add(node, "Slice", value, start, stop, self._writer.ints(1))

    def _side_by_side(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """[batch, heads, seq, head_dim] as [batch, seq, heads · head_dim]."""
        turned = self._writer.add(node, "Transpose", value, perm=[0, 2, 1, 3])
        return self._writer.add(node, "Reshape", turned, self._writer.constant("packed", np.array([0, 0, -1])))

    def _apart(self, node: ir.Node, rows: ir.Value, like: ir.Value) -> ir.Value:
        """Back again."""
        turned = self._writer.add(node, "Transpose", like, perm=[0, 2, 1, 3])
        split = self._writer.add(node, "Reshape", rows, self._writer.add(node, "Shape", turned))
        return self._writer.add(node, "Transpose", split, perm=[0, 2, 1, 3])
