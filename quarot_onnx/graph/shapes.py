"""Inferred shapes and types of a graph's values, kept beside the graph.

onnx's shape inference with data propagation gives the length of the axes that matter (the hidden size, the
heads, head_dim) in every exporter's spelling, also where the exporter wrote no shapes at all.
"""

import logging

import onnx_ir as ir


class Shapes:
    """Shapes by value; the model they were inferred for is left as it is."""

    def __init__(self, model: ir.Model) -> None:
        """Infer the shapes of ``model``; weights do not take part with their contents."""
        from onnx_ir.passes.common import ShapeInferencePass  # noqa: PLC0415  (imports onnx's checker: 50 ms)

        probe = model.clone()
        logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
        level = logger.level
        # Where an exporter wrote a wrong shape, inference stops with a logged traceback and what it wrote stays.
        logger.setLevel(logging.CRITICAL)
        try:
            ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(probe)
        finally:
            logger.setLevel(level)
        self._shapes: dict[str, ir.Shape] = {}
        self._dtypes: dict[str, ir.DataType] = {}
        for graph in (model.graph, probe.graph):
            for value in (*graph.inputs, *(out for node in graph for out in node.outputs)):
                if value.name and value.shape is not None:
                    self._shapes[value.name] = value.shape
                if value.name and value.dtype is not None:
                    self._dtypes[value.name] = value.dtype

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The element type of a value, or None."""
        return value.dtype or self._dtypes.get(value.name or "")

    def of(self, value: ir.Value) -> tuple[int | None, ...] | None:
        """The shape of a value, unknown lengths as None; None when even the rank is unknown."""
        if value.const_value is not None:
            return tuple(int(d) for d in value.const_value.shape)
        shape = self._shapes.get(value.name or "")
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
