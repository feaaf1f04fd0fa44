"""What inputs of a decoder graph can be for, and what the graph tells of its tables and its attention.

:mod:`quarot_onnx.calibration.roles` says which input is which.
"""

import enum
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from quarot_onnx.errors import ModelError
from quarot_onnx.graph.linear import linear_at
from quarot_onnx.graph.query import attribute_int, resolve_constant, small_ints
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.graph.tags import is_online
from quarot_onnx.io.companions import GENAI_CONFIG, read_json, section

INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32})
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_CACHE_TYPES = FLOATS | {ir.DataType.INT8, ir.DataType.UINT8}

# Ops that hand integers on: what comes out still stands for the same ids, put into range or with some replaced.
LAYOUT = frozenset({"Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand", "Transpose"})
"""What hands all that an input holds on, laid out otherwise."""

_CARRIERS = LAYOUT | {"Clip", "Where", "Max", "Min", "Mod", "Abs", "Add", "Sub", "Slice"}
# A position is scaled by the inverse frequencies (MatMul, Mul, Einsum) before its cosine is taken.
_POSITION_CARRIERS = LAYOUT | {"MatMul", "Mul", "Concat", "Einsum", "Clip", "Add", "Slice", "Gather", "Split"}
_POSITION_ENDS = frozenset({"Cos", "Sin", "RotaryEmbedding"})
_TABLE_OPS = frozenset({"Gather", "GatherBlockQuantized"})
# A tied table may be stored as the head reads it, transposed, or quantized.
_TABLE_MAKERS = frozenset({"Transpose", "DequantizeLinear", "Cast", "Identity"})
_BY_COLUMNS = frozenset({"MatMul", "MatMulInteger", "MatMulIntegerToFloat"})
"""Products whose weight is [in, out]."""
_PRODUCTS = _BY_COLUMNS | {"Gemm", "Einsum", "MatMulNBits", "DynamicQuantizeMatMul", "QLinearMatMul"}
_FAR = 32
"""More nodes than lie between a projection and its attention: a norm of heads, RoPE, an online rotation, rounding."""


class InputRole(enum.Enum):
    """What a decoder's input is for."""

    TOKENS = "token ids"
    EMBEDDINGS = "token embeddings"
    MASK = "attention mask"
    BIAS = "additive attention mask"
    POSITIONS = "position ids"
    PAST = "KV cache"
    KEPT = "number of logits to keep"
    PAST_LENGTH = "length of the past"
    TOTAL_LENGTH = "length with the past"
    LAST_POSITION = "last position of each row"
    UNREAD = "read by nothing"
    UNKNOWN = "not known"


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: ``shape`` has an int where a dimension is fixed, its symbol or None where it is free.

    ``shape`` is None where not even the rank is known.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[int | str | None, ...] | None

    @property
    def rank(self) -> int | None:
        """The number of dimensions, None where unknown."""
        return None if self.shape is None else len(self.shape)

    @property
    def width(self) -> int | None:
        """The length of the last axis, None where unknown."""
        return self.shape[-1] if self.shape and isinstance(self.shape[-1], int) else None

    @classmethod
    def of(cls, value: ir.Value) -> "TensorSpec":
        """The spec of an onnx-ir value."""
        shape = None
        if value.shape is not None:
            shape = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
        return cls(value.name or "", value.dtype or ir.DataType.UNDEFINED, shape)


def position_axis(shape: Sequence[int | str | None]) -> int:
    """The axis of a cache's positions: the third as in [batch, KV heads, positions, head_dim], or the last of fewer.

    Scales that are cached with quantized keys and values may have fewer axes; of three the free one is that of the
    positions, as in [batch, positions, KV heads].
    """
    if len(shape) == 3 and isinstance(shape[2], int) and not isinstance(shape[1], int):
        return 1
    return min(2, len(shape) - 1)


def embedding_rows(graph: ir.Graph, token_input: str) -> int | None:
    """The rows of the largest constant table that the token ids index, None if there is none."""
    value = next((value for value in graph.inputs if value.name == token_input), None)
    return None if value is None else max(_indexed_tables(value), default=None)


def embedding_shape(graph: ir.Graph, token_input: str) -> tuple[int, int] | None:
    """Rows and columns of the largest constant table that the token ids index, None if there is none."""
    value = next((value for value in graph.inputs if value.name == token_input), None)
    found = [] if value is None else [_table_shape(node, index) for node, index in _reached(value, _CARRIERS)]
    return max((shape for shape in found if shape is not None), default=None)


def attention_shape(model: ir.Model) -> tuple[int | None, int | None]:
    """``(kv_heads, head_dim)`` of the fused attention nodes, whose cache inputs may leave both symbolic.

    Heads are attributes of the node; the width of V is ``kv_heads * head_dim``, that of merged Q, K and V
    ``(heads + 2 * kv_heads) * head_dim``.
    """
    node = next((node for node in model.graph if node.op_type == "GroupQueryAttention"), None)
    if node is None:
        return None, None
    shapes = Shapes(model)
    heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    query, _, value = node.inputs[:3]
    for operand, count in ((value, kv_heads), (query, heads if value is not None else heads + 2 * kv_heads)):
        if operand is not None and (width := shapes.last(operand) or _projected_width(operand)) is not None:
            return kv_heads, width // count
    return kv_heads, None


def logits_output(outputs: Sequence[TensorSpec]) -> TensorSpec:
    """The output that holds the logits: the one of that name, else the first float one of three axes."""
    named = [spec for spec in outputs if spec.name == "logits"]
    shaped = [spec for spec in outputs if spec.rank == 3 and spec.dtype in FLOATS]
    found = named or shaped or [spec for spec in outputs if spec.rank is None]
    if not found:
        raise ModelError("the graph has no float output [batch, sequence, vocabulary]: it is no language model")
    return found[0]


def no_logits(name: str, width: int, table: tuple[int, int] | None) -> str:
    """Why an output holds no logits, but hidden states or the scores of labels; empty where it may hold some.

    Args:
        name: The output.
        width: Its last axis.
        table: Rows and columns of the embedding, where they are known.
    """
    rows, columns = table or (width, width)
    if width > 1 and (width == rows or (width != columns and 2 * width > rows)):
        return ""
    tokens = "" if table is None else f" and a vocabulary of {rows} tokens"
    what = "a single column" if width == 1 else "the width of its hidden states" if width == columns else "labels"
    return f"its output {name!r} is {width} wide, {what}{tokens}"


def find_logits(outputs: Sequence[TensorSpec], table: tuple[int, int] | None) -> tuple[TensorSpec, str]:
    """The output that is taken for the logits, and why it holds none; empty where it may hold some.

    Args:
        outputs: Those of the graph.
        table: Rows and columns of the embedding, where they are known.

    Raises:
        ModelError: There is no output of their form.
    """
    found = logits_output(outputs)
    why = no_logits(found.name, found.width, table) if found.width is not None else ""
    shaped = (spec for spec in outputs if spec.rank == 3 and spec.dtype in FLOATS)
    better = next((spec for spec in shaped if why and table is not None and spec.width == table[0]), None)
    return (found, why) if better is None else (better, "")


def config_shape(folder: Path) -> tuple[int | None, int | None]:
    """``(kv_heads, head_dim)`` as genai_config.json or config.json beside a model tells them.

    Raises:
        ModelError: One of them is not readable.
    """
    genai = section(read_json(folder / GENAI_CONFIG, ModelError), "model", "decoder")
    if genai.get("head_size"):
        return genai.get("num_key_value_heads"), genai["head_size"]
    config = read_json(folder / "config.json", ModelError)
    heads = config.get("num_attention_heads")
    width = config.get("head_dim") or (config["hidden_size"] // heads if heads and "hidden_size" in config else None)
    return config.get("num_key_value_heads", heads), width


def _projected_width(value: ir.Value) -> int | None:
    """The columns of the weight, float or quantized, of the product that ``value`` comes from."""
    for _ in range(_FAR):
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Split":
            sizes = small_ints(node.inputs[1]) if len(node.inputs) > 1 else None
            return sizes[value.index() or 0] if sizes else None
        if node.op_type in _PRODUCTS and not is_online(node):
            return _columns(node)
        operand = next((v for v in node.inputs if v is not None and resolve_constant(v) is None), None)
        if operand is None:
            return None
        value = operand
    return None


def _columns(node: ir.Node) -> int | None:
    """The width of what a product with a constant weight gives, None of any other."""
    if node.op_type == "MatMulNBits":
        return attribute_int(node, "N", 0) or None
    linear = linear_at(node)
    if linear is not None:
        return linear.out_features
    weight = node.inputs[1] if node.op_type in _BY_COLUMNS else None
    dequantize = None if weight is None else weight.producer()
    if dequantize is not None and dequantize.op_type == "DequantizeLinear":
        weight = dequantize.inputs[0]
    constant = resolve_constant(weight)
    return None if constant is None else constant.shape[-1]


def is_position(value: ir.Value) -> bool:
    """Whether an integer input reaches a cosine, a RotaryEmbedding or a table of its own."""
    reached = _reached(value, _POSITION_CARRIERS)
    return any(node.op_type in _POSITION_ENDS or _table(node, index) is not None for node, index in reached)


def _indexed_tables(value: ir.Value) -> list[int]:
    heights = (_table(node, index) for node, index in _reached(value, _CARRIERS))
    return [height for height in heights if height is not None]


def _table(node: ir.Node, index: int) -> int | None:
    """The rows of the constant 2-D table that a node's input indexes, None if it is no table look-up."""
    shape = _table_shape(node, index)
    return None if shape is None else shape[0]


def _table_shape(node: ir.Node, index: int) -> tuple[int, int] | None:
    """The same, with its columns."""
    if node.op_type not in _TABLE_OPS or index != 1:
        return None
    data, turned = node.inputs[0], False
    while data is not None and data.const_value is None:
        producer = data.producer()
        if producer is None or producer.op_type not in _TABLE_MAKERS:
            return None
        turned ^= producer.op_type == "Transpose"
        data = producer.inputs[0]
    if data is None or data.const_value is None or len(data.const_value.shape) != 2:
        return None
    rows, columns = data.const_value.shape.numpy()[:: -1 if turned else 1]
    if node.op_type == "GatherBlockQuantized" and data.const_value.dtype == ir.DataType.UINT8:
        columns *= 8 // attribute_int(node, "bits", 4)  # several to a byte
    return int(rows), int(columns)


def _reached(value: ir.Value, carriers: Set[str]) -> list[tuple[ir.Node, int]]:
    """Every use (node, input index) of a value, and of what the carrier ops make of it."""
    found: list[tuple[ir.Node, int]] = []
    queue, seen = [value], {value}
    while queue:
        for node, index in queue.pop().uses():
            found.append((node, index))
            if node.op_type in carriers:
                fresh = [output for output in node.outputs if output not in seen]
                seen.update(fresh)
                queue.extend(fresh)
    return found
