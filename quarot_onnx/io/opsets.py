"""Whether an operator of the standard domain means the same in two versions of the operator set."""

import onnx_ir as ir
from onnx import defs

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
"""Both are names of one domain; a loaded model has the first alone."""

_FIRST = 13

# From opset 13 to 21 these gained types, optional inputs or attributes whose defaults are the old meaning.
# fmt: off
_WIDENED = frozenset({
    "Add", "Cast", "CastLike", "Constant", "ConstantOfShape", "CumSum", "DequantizeLinear", "Div", "Equal",
    "Flatten", "GreaterOrEqual", "Identity", "If", "IsInf", "IsNaN", "LeakyRelu", "LessOrEqual", "Loop",
    "Mul", "PRelu", "Pad", "Pow", "QLinearMatMul", "QuantizeLinear", "Relu", "Reshape", "Scan",
    "ScatterElements", "ScatterND", "Shape", "Size", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
})
# fmt: on


def means_the_same(node: ir.Node, one: int, other: int) -> bool:
    """Whether a node computes the same in two versions of its domain's operator set.

    Operators that ONNX does not define (onnxruntime's own) have one version each.

    Args:
        node: The node.
        one: A version.
        other: Another.

    Returns:
        True if the same definition is in force, or one that was only opened to further types or options.
    """
    before, after = _schema(node, one), _schema(node, other)
    if before is None or after is None:
        return before is after
    if before.since_version == after.since_version:
        return True
    if node.domain in STANDARD_DOMAINS and node.op_type in _WIDENED and min(one, other) >= _FIRST:
        return True
    return _signature(before) == _signature(after)


def _schema(node: ir.Node, version: int) -> defs.OpSchema | None:
    domain = "" if node.domain in STANDARD_DOMAINS else node.domain
    try:
        return defs.get_schema(node.op_type, version, domain)
    except defs.SchemaError:
        return None


def _signature(schema: defs.OpSchema) -> object:
    """Everything that a definition takes, but for the types."""
    attributes = {
        name: (attribute.type, attribute.required, attribute.default_value.SerializeToString())
        for name, attribute in schema.attributes.items()
    }
    operands = [[(value.name, value.option) for value in side] for side in (schema.inputs, schema.outputs)]
    return attributes, operands
