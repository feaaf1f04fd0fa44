"""A spelt-out attention, softmax(Q Kᵀ + mask) V: the prefix goes in front of K and V where the products read them.

::

    Kᵀ ── Concat(prefix, ·) ── MatMul ── (scale, cap, mask) ── Softmax ── MatMul ── ...
    V  ── Concat(prefix, ·) ─────────────────────────────────────────────┘

The caches leave the graph before that, so they hold what the caller knows of. Whatever meets the scores key by key (a
mask that is added or chosen by) gets columns that show the prefix, however the graph has made it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.errors import ModelError
from quarot_onnx.graph.products import SCORE_PATH, operand_axis
from quarot_onnx.graph.query import attribute_int, consumers, data_input, data_users, label, passes, scalar
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.prefix.graft import Graft, forget_shape
from quarot_onnx.sites.scores import context_product, score_product

_NEUTRAL = {"Add": 0.0, "Sub": 0.0, "Mul": 1.0, "Div": 1.0}
"""What an operand holds for keys that it leaves as they are."""


@dataclass(frozen=True, eq=False)
class Operand:
    """K or V where a product reads it.

    Attributes:
        node: The product.
        index: Which of its inputs.
        axis: The keys' axis there.
        dtype: The type.
    """

    node: ir.Node
    index: int
    axis: int
    dtype: ir.DataType

    @property
    def value(self) -> ir.Value:
        """What is read."""
        return data_input(self.node, self.index)


@dataclass(frozen=True, eq=False)
class Mask:
    """Something that meets the scores key by key: input ``index`` of ``node``, neutral where it is ``filling``."""

    node: ir.Node
    index: int
    filling: float
    dtype: ir.DataType


@dataclass(frozen=True, eq=False)
class SpeltPlace:
    """A spelt-out attention; ``operands`` are K and V."""

    operands: tuple[Operand, Operand]
    masks: tuple[Mask, ...]

    @property
    def wanted(self) -> tuple[ir.Value, ...]:
        """What the prefix's own run must give."""
        return tuple(operand.value for operand in self.operands)

    def attach(self, graft: Graft, seen: Mapping[str, NDArray[Any]]) -> None:
        """Put the prefix in."""
        for name, operand in zip(("key", "value"), self.operands, strict=True):
            own = graft.per_row(name, seen[operand.value.name or ""][:1], operand.dtype, operand.node)
            joined = graft.joined(own, operand.value, operand.axis, operand.node)
            operand.node.replace_input_with(operand.index, joined)
        for mask in self.masks:
            value = data_input(mask.node, mask.index)
            wide = graft.widened(value, mask.filling, mask.dtype)
            mask.node.replace_input_with(mask.index, wide)
        for value in self._scores():
            forget_shape(value)

    def _scores(self) -> Iterator[ir.Value]:
        """Everything that has an axis of keys, from the product with K up to that with V."""
        (scores, product), found = (operand.node for operand in self.operands), set[ir.Value]()
        queue = [scores.outputs[0]]
        while queue:
            value = queue.pop()
            found.add(value)
            yield value
            later = (out for node, _ in consumers(value) if node is not product for out in node.outputs)
            queue.extend(out for out in later if out not in found)


def spelt_place(softmax: ir.Node, shapes: Shapes) -> SpeltPlace:
    """The place of an attention.

    Raises:
        ModelError: Its keys cannot be told from the graph.
    """
    scores, product = score_product(data_input(softmax)), context_product(softmax.outputs[0])
    if scores is None or product is None:
        raise ModelError(f"{label(softmax)}: the products around the Softmax are not understood")
    operands = (_operand(scores, -1, shapes), _operand(product, -2, shapes))
    return SpeltPlace(operands, tuple(_masks(scores, softmax, shapes)))


def _operand(product: ir.Node, axis: int, shapes: Shapes) -> Operand:
    """Input 1 of a product, whose keys lie along ``axis`` as the product takes it."""
    value, where = data_input(product, 1), operand_axis(product, 1, axis, shapes)
    shape, dtype = shapes.of(value), shapes.dtype(value)
    turned = bool(attribute_int(product, "transBatchB", 0))
    if where is None or turned or dtype is None or (shape is not None and len(shape) != 4):
        raise ModelError(f"{label(product)} does not read [batch, heads, keys, head_dim] of a known type")
    return Operand(product, 1, where, dtype)


def _masks(scores: ir.Node, softmax: ir.Node, shapes: Shapes) -> list[Mask]:
    """All that meets the scores between their product and the Softmax."""
    found: list[Mask] = []
    value = scores.outputs[0]
    while True:
        users = [(node, index) for node, index in data_users(value) if not _is_guard(node)]
        if len(users) != 1:
            raise ModelError(f"{label(scores)}: its scores have {len(users)} users")
        node, index = users[0]
        if node is softmax:
            return found
        if node.op_type not in SCORE_PATH and not passes(node):
            raise ModelError(f"{label(node)} ({node.op_type}) stands between scores and Softmax")
        for other, operand in enumerate(node.inputs):
            if operand is None or other == index or scalar(operand) is not None or shapes.is_one_per_row(operand):
                continue  # one number for all keys
            found.append(_mask(node, index, other, operand, shapes))
        value = node.outputs[0]


def _mask(node: ir.Node, path: int, index: int, operand: ir.Value, shapes: Shapes) -> Mask:
    """An operand that has a number for each key; ``path`` is the input by which the scores come."""
    dtype = shapes.dtype(operand)
    filling = _NEUTRAL.get(node.op_type)
    if node.op_type == "Where":
        # A condition chooses the scores; the other branch may hold anything.
        filling = float(path == 1) if index == 0 else 0.0
        dtype = ir.DataType.BOOL if index == 0 else dtype
    dtype = dtype or shapes.dtype(node.outputs[0])
    if filling is None or dtype is None:
        raise ModelError(f"{label(node)} ({node.op_type}) meets the scores in a way that is not understood")
    return Mask(node, index, filling, dtype)


def _is_guard(node: ir.Node) -> bool:
    """Whether a node only asks for NaN."""
    return node.op_type == "IsNaN" and not any(user.op_type != "Where" for user, _ in consumers(node.outputs[0]))
