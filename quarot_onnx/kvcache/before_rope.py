"""Where keys stand before RoPE, x·cos + turn(x)·sin."""

import onnx_ir as ir

from quarot_onnx.errors import ModelError
from quarot_onnx.graph.query import data_input, through

_TURN = frozenset({"Concat", "Neg", "Slice", "Split", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Cast"})
_STEPS = 16
"""Turning takes two Slices, a Neg and a Concat, or a Split in place of the Slices."""


def before_rope(value: ir.Value) -> ir.Value:
    """What RoPE reads; its axes are those of what RoPE gives.

    Args:
        value: K after RoPE.

    Raises:
        ModelError: No RoPE is understood there.
    """
    node = through(value).producer()
    found = None
    if node is not None and node.op_type == "RotaryEmbedding":
        found = data_input(node)
    elif node is not None and node.op_type == "Add":
        found = _turned(node)
    elif node is not None and node.op_type == "Concat":
        found = _partly_turned(node)
    if found is None:
        raise ModelError(
            f"no RoPE is understood behind {value.name!r}, so keys cannot be rounded before it; round them after it, "
            "or leave out R3 where that stands in between"
        )
    return found


def _turned(add: ir.Node) -> ir.Value | None:
    """X of x·cos + turn(x)·sin, in either order; None where the sum is another one."""
    products = [through(data_input(add, index)).producer() for index in (0, 1)]
    if any(node is None or node.op_type != "Mul" for node in products):
        return None
    for plain, turned in (products, products[::-1]):
        assert plain is not None
        assert turned is not None
        behind = _behind(turned)
        for operand in plain.inputs:
            if operand in behind:
                return operand
    return None


def _partly_turned(concat: ir.Node) -> ir.Value | None:
    """X where a part of every head alone has RoPE: both parts are cut from it."""
    sources = set()
    for operand in concat.inputs:
        node = None if operand is None else through(operand).producer()
        part = _turned(node) if node is not None and node.op_type == "Add" else operand
        cut = None if part is None else through(part).producer()
        if cut is None or cut.op_type not in {"Slice", "Split"}:
            return None
        sources.add(data_input(cut))
    return sources.pop() if len(sources) == 1 else None


def _behind(product: ir.Node) -> set[ir.Value]:
    """What a product's operands are made of by moving entries about."""
    found, queue = set[ir.Value](), [value for value in product.inputs if value is not None]
    for _ in range(_STEPS):
        if not queue:
            break
        value = queue.pop(0)
        found.add(value)
        node = value.producer()
        if node is not None and node.op_type in _TURN:
            queue.extend(v for v in node.inputs if v is not None and v not in found)
    return found
