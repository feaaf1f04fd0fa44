"""Inferred shapes and types of a graph's values, kept beside the graph.

onnx's shape inference with data propagation gives the length of the axes that matter (the hidden size, the
heads, head_dim) in every exporter's spelling, also where the exporter wrote no shapes at all.
"""

from collections.abc import Iterator

import onnx_ir as ir

from quarot_onnx.graph.inference import Lengths, inferred


class Shapes:
    """Shapes by value; the model they were inferred for is left as it is."""

    def __init__(self, model: ir.Model) -> None:
        """Infer the shapes of ``model``."""
        found = inferred(model)
        self._shapes: dict[ir.Value, Lengths] = {}
        self._dtypes: dict[ir.Value, ir.DataType] = {}
        for value in _values(model.graph):
            dtype, lengths = found.get(value.name or "", (None, None))
            if lengths is None and value.shape is not None:
                lengths = tuple(d if isinstance(d, int) else None for d in value.shape)
            if lengths is not None:
                self._shapes[value] = lengths
            if kind := dtype or value.dtype:
                self._dtypes[value] = kind

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The element type of a value, or None."""
        return value.dtype or self._dtypes.get(value)

    def of(self, value: ir.Value) -> Lengths | None:
        """The shape of a value, unknown lengths as None; None when even the rank is unknown."""
        if value.const_value is not None and not value.is_graph_input():
            return tuple(int(d) for d in value.const_value.shape.numpy())
        return self._shapes.get(value)

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


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """A graph's inputs and what its nodes compute."""
    yield from graph.inputs
    for node in graph:
        yield from node.outputs
