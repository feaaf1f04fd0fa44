"""Take RoPE out of a GroupQueryAttention, so that R3 can stand between RoPE and the attention.

    GQA(qkv, do_rotary=1)   becomes   GQA(RoPE(q), RoPE(k), v, do_rotary=0)

The fused operator computes the positions itself. Here they are derived from ``seqlens_k`` (total length minus
one, per batch row) and the length S of what is fed:

    position[b, s] = max(seqlens_k[b] + 1 - S, 0) + s

which is what onnxruntime does for a first prompt (right-padded rows included), for continued prompts and for
single decoded tokens. One computation serves all layers.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quarot_onnx.graph.edit import Editor
from quarot_onnx.graph.query import attribute_int, data_input
from quarot_onnx.sites.attention import COS, SIN
from quarot_onnx.sites.model import Attention

ROPE = "RotaryEmbedding"

SEQLENS, TOTAL, POSITIONS = 5, 6, 9
"""Inputs of GroupQueryAttention."""


@dataclass(frozen=True, eq=False)
class SplitHeads:
    """Q and K after RoPE, packed [batch, seq, heads · head_dim], before they enter the operator."""

    query: ir.Value
    key: ir.Value


class RopeSplitter:
    """Splits GroupQueryAttentions of one graph."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._positions: dict[ir.Value, ir.Value] = {}
        self._sizes: dict[tuple[int, int], ir.Value] = {}

    def split(self, attention: Attention) -> SplitHeads:
        """Give one GroupQueryAttention separate Q, K and V, with RoPE outside.

        Args:
            attention: Its node is the GroupQueryAttention.

        Returns:
            The values that the operator now reads as Q and K.
        """
        node, edit = attention.node, self._editor
        self.unpack(attention)
        if attribute_int(node, "do_rotary", 0):
            positions = self._position_ids(node)
            for index in (0, 1):
                node.replace_input_with(index, self._rope(attention, index, positions))
            for index in (COS, SIN, POSITIONS):
                if index < len(node.inputs):
                    node.replace_input_with(index, None)
            edit.set_int(node, "do_rotary", 0)
        return SplitHeads(data_input(node, 0), data_input(node, 1))

    def unpack(self, attention: Attention) -> None:
        """Split a packed QKV into its three parts; what is apart already stays."""
        node, edit = attention.node, self._editor
        if node.inputs[1] is not None:
            return
        q, kv = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        if (q, kv) not in self._sizes:
            tensor = ir.Tensor(np.array([q, kv, kv], dtype=np.int64))
            self._sizes[q, kv] = edit.initializer("quarot/qkv_sizes", tensor)
        axis = ir.AttrInt64("axis", -1)
        split = edit.node(
            "Split", [node.inputs[0], self._sizes[q, kv]], f"{node.name}/Split", outputs=3, attributes=[axis]
        )
        edit.before(node, [split])
        for index, out in enumerate(split.outputs):
            node.replace_input_with(index, out)

    def _rope(self, attention: Attention, index: int, positions: ir.Value) -> ir.Value:
        """A RotaryEmbedding of Q (index 0) or K (index 1)."""
        node, edit = attention.node, self._editor
        assert attention.heads is not None
        width = attention.heads.rope_width
        assert width is not None
        attributes = [ir.AttrInt64("interleaved", attribute_int(node, "rotary_interleaved", 0))]
        if width != attention.head_dim:
            heads = attention.num_heads if index == 0 else attention.num_kv_heads
            attributes += [ir.AttrInt64("num_heads", heads), ir.AttrInt64("rotary_embedding_dim", width)]
        inputs = [node.inputs[index], positions, node.inputs[COS], node.inputs[SIN]]
        rope = edit.node(ROPE, inputs, f"{node.name}/Rope", domain="com.microsoft", attributes=attributes)
        edit.before(node, [rope])
        return rope.outputs[0]

    def _position_ids(self, node: ir.Node) -> ir.Value:
        """Positions [batch, seq] as int64; the operator's own input where the graph gives one."""
        given = node.inputs[POSITIONS] if len(node.inputs) > POSITIONS else None
        if given is not None:
            return given
        seqlens = data_input(node, SEQLENS)
        if seqlens not in self._positions:
            self._positions[seqlens] = self._derive(node, seqlens)
        return self._positions[seqlens]

    def _derive(self, node: ir.Node, seqlens: ir.Value) -> ir.Value:
        """The formula of the module's docstring as nodes before ``node``."""
        edit = self._editor

        def constant(name: str, values: int | list[int]) -> ir.Value:
            return edit.initializer(f"quarot/{name}", ir.Tensor(np.array(values, dtype=np.int64)))

        def add(op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
            attrs = [ir.AttrInt64(key, value) for key, value in attributes.items()]
            made = edit.node(op, inputs, f"quarot/position_ids/{op}", attributes=attrs)
            edit.before(node, [made])
            return made.outputs[0]

        zero, one = constant("zero", 0), constant("one", 1)
        length = add("Gather", add("Shape", data_input(node, 0)), one, axis=0)
        last = add("Cast", seqlens, to=int(ir.DataType.INT64))
        first = add("Max", add("Sub", add("Add", last, one), length), zero)
        column = add("Reshape", first, constant("column", [-1, 1]))
        return add("Add", column, add("Range", zero, length, one))
