"""Inferred shapes and types of a graph's values, kept beside the graph.

onnx's shape inference with data propagation gives the length of the axes that matter (the hidden size, the
heads, head_dim) in every exporter's spelling, also where the exporter wrote no shapes at all. onnx knows nothing of
onnxruntime's operators; for inference each of those that its optimiser makes is replaced with what has the same shape.
"""

import logging
from collections.abc import Iterator

import onnx_ir as ir

from quarot_onnx.graph.query import attribute_int


class Shapes:
    """Shapes by value; the model they were inferred for is left as it is."""

    def __init__(self, model: ir.Model) -> None:
        """Infer the shapes of ``model``."""
        from onnx_ir.passes.common import ShapeInferencePass  # noqa: PLC0415  (imports onnx's checker: 50 ms)

        probe = model.clone()
        _release_defaults(probe.graph)
        for node in list(probe.graph):
            _stand_in(node)
        logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
        level = logger.level
        # Where an exporter wrote a wrong shape, inference stops with a logged traceback and what it wrote stays.
        logger.setLevel(logging.CRITICAL)
        try:
            ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(probe)
        finally:
            logger.setLevel(level)
        inferred = {value.name: value for value in _values(probe.graph) if value.name}
        self._shapes: dict[ir.Value, ir.Shape] = {}
        self._dtypes: dict[ir.Value, ir.DataType] = {}
        for value in _values(model.graph):
            for source in (value, inferred.get(value.name or "")):
                if source is not None and source.shape is not None:
                    self._shapes[value] = source.shape
                if source is not None and source.dtype is not None:
                    self._dtypes[value] = source.dtype

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The element type of a value, or None."""
        return value.dtype or self._dtypes.get(value)

    def of(self, value: ir.Value) -> tuple[int | None, ...] | None:
        """The shape of a value, unknown lengths as None; None when even the rank is unknown."""
        if value.const_value is not None and not value.is_graph_input():
            return tuple(int(d) for d in value.const_value.shape.numpy())
        shape = self._shapes.get(value)
        return None if shape is None else tuple(d if isinstance(d, int) else None for d in shape)

    def rank(self, value: ir.Value) -> int | None:
        """The number of axes, or None."""
        shape = self.of(value)
        return None if shape is None else len(shape)

    def last(self, value: ir.Value) -> int | None:
        """The length of the last axis, or None."""
        shape = self.of(value)
        return shape[-1] if shape else None

    def is_single(self, value: ir.Value) -> bool:
        """Whether the value surely holds one number."""
        shape = self.of(value)
        return shape is not None and all(d == 1 for d in shape)

    def is_one_per_row(self, value: ir.Value) -> bool:
        """Whether the value surely holds one number for each vector along the last axis, or one for all."""
        shape = self.of(value)
        return shape is not None and (not shape or shape[-1] == 1)


_LIKE_INPUT = frozenset(
    {
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "BiasGelu",
        "FastGelu",
        "Gelu",
        "QuickGelu",
        "BiasSoftmax",
        "RotaryEmbedding",
    }
)
"""Operators of onnxruntime whose first output (and a Skip-norm's sum) has the shape of their first input."""

_SKIP_SUM = 3


def _release_defaults(graph: ir.Graph) -> None:
    """Make inputs with a default plain inputs: another value, of another length, may be fed."""
    for value in graph.inputs:
        if value.name is not None and value.name in graph.initializers:
            del graph.initializers[value.name]
            value.const_value = None


def _stand_in(node: ir.Node) -> None:
    """Replace a node that onnx does not know, in a graph that is only looked at."""
    x = node.inputs[0] if node.inputs else None
    known = node.domain == "" and node.op_type != "SimplifiedLayerNormalization"
    if x is None or node.graph is None or known:
        return
    if node.op_type in _LIKE_INPUT:
        for index in (0, _SKIP_SUM):
            if index < len(node.outputs) and node.outputs[index].name:
                same = ir.Node("", "Identity", [x])
                node.graph.insert_before(node, same)
                _give_name(node.outputs[index], same.outputs[0])
    elif node.op_type == "FusedMatMul":
        product = ir.Node("", "Einsum", node.inputs, [ir.AttrString("equation", _equation(node))])
        node.graph.insert_before(node, product)
        _give_name(node.outputs[0], product.outputs[0])


def _give_name(old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` be known by the name of ``old``, to all its users too."""
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, f"{old.name}/fused"
    new.shape, new.type = old.shape, old.type


def _equation(product: ir.Node) -> str:
    """A FusedMatMul in Einsum's notation; its attributes are explained in ``graph.products``."""
    sides = []
    for side, axes in (("A", ("m", "k")), ("B", ("k", "n"))):
        first, last = reversed(axes) if attribute_int(product, f"trans{side}", 0) else axes
        sides.append(f"{first}...{last}" if attribute_int(product, f"transBatch{side}", 0) else f"...{first}{last}")
    return f"{','.join(sides)}->...mn"


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """A graph's inputs and what its nodes compute."""
    yield from graph.inputs
    for node in graph:
        yield from node.outputs
