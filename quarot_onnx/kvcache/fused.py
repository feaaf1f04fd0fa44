"""The integer cache of GroupQueryAttention: onnxruntime rounds what is new, and reads integers.

Its scales are fixed, one for the whole tensor or one for each channel of each KV head; K and V are of one type. Of 4
bits the even entries of a head lie in the low halves of the bytes.
"""

import numpy as np
import onnx_ir as ir

from quarot_onnx.graph.edit import Editor
from quarot_onnx.graph.query import data_input
from quarot_onnx.io.tensors import read_array
from quarot_onnx.kvcache.integers import Floats, stored
from quarot_onnx.kvcache.places import FusedPlace, retype
from quarot_onnx.sites.attention import K_SCALE


class FusedCache:
    """Rewrites GroupQueryAttentions of one graph."""

    def __init__(self, model: ir.Model) -> None:
        """Write into ``model``."""
        self._editor = Editor(model)

    def write(self, place: FusedPlace, bits: int, key_scales: Floats, value_scales: Floats) -> None:
        """Let one operator keep integers.

        Args:
            place: The operator.
            bits: 8 or 4.
            key_scales: [1, 1, 1, 1], [1, heads, 1, 1] or [1, heads, 1, head_dim].
            value_scales: The same of values.
        """
        node, kind = place.node, ir.DataType.INT8 if bits == 8 else ir.DataType.UINT8
        head_dim = place.attention.head_dim
        self._editor.set_int(node, "kv_cache_bit_width", bits)
        node.resize_inputs(max(len(node.inputs), K_SCALE + 2))
        # Both are of one kind. The operator knows no scales of heads: they are those of all their channels.
        whole = key_scales.size == value_scales.size == 1
        shape = (1,) if whole else (1, place.attention.num_kv_heads, 1, head_dim)
        way = "PER_TENSOR" if whole else "PER_CHANNEL"
        both = (("k", place.keys, key_scales), ("v", place.values, value_scales))
        for index, (name, cache, scales) in enumerate(both):
            node.attributes[f"{name}_quant_type"] = ir.AttrString(f"{name}_quant_type", way)
            spread = np.ascontiguousarray(np.broadcast_to(scales.reshape(1) if whole else scales, shape))
            scale = self._editor.initializer(f"quarot/{name}_scale", ir.Tensor(spread))
            node.replace_input_with(K_SCALE + index, scale)
            self._round_constants(data_input(node, 3 + index), scales, bits)
            for value in (cache.past, cache.present, node.outputs[1 + index]):
                retype(value, kind, head_dim * bits // 8)

    def _round_constants(self, past: ir.Value, scales: Floats, bits: int) -> None:
        """What stands before the caller's cache, as a prefix does, becomes integers like it."""
        queue = [past]
        while queue:
            value = queue.pop()
            node = value.producer()
            tensor = value.const_value
            if tensor is not None and not value.is_graph_input():
                integers = stored(read_array(tensor).astype(np.float32), scales, bits)
                fresh = self._editor.initializer(f"{value.name}_int", ir.Tensor(integers))
                for use in list(value.uses()):
                    use.node.replace_input_with(use.idx, fresh)
                self._editor.prune(value)
            elif node is not None and node.op_type in {"Concat", "Slice", "Expand"}:
                operands = node.inputs if node.op_type == "Concat" else node.inputs[:1]
                queue += [operand for operand in operands if operand is not None]
                for out in node.outputs:
                    out.type = ir.TensorType(ir.DataType.INT8 if bits == 8 else ir.DataType.UINT8)
