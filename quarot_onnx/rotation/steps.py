"""The steps of every weight, collected until each has its one transform."""

from collections.abc import Iterator

import onnx_ir as ir

from quarot_onnx.graph.linear import WEIGHT_INPUT, Linear
from quarot_onnx.graph.query import Constant
from quarot_onnx.rotation.edits import WeightEdit
from quarot_onnx.rotation.transform import Step, WeightTransform


class WeightSteps:
    """What happens to constants, by the node and the input where they enter."""

    def __init__(self) -> None:
        self._steps: dict[tuple[ir.Node, int], tuple[Constant, bool, list[Step]]] = {}

    def add(self, node: ir.Node, index: int, constant: Constant, step: Step, *, stored: bool = False) -> None:
        """A further step for what enters ``node`` at ``index``; ``stored`` writes the transpose of the constant."""
        self._steps.setdefault((node, index), (constant, stored, []))[2].append(step)

    def weight(self, linear: Linear, step: Step) -> None:
        """A further step for a Linear's weight, seen as [in, out]."""
        self.add(linear.node, WEIGHT_INPUT, linear.weight, step, stored=linear.stored_transposed)

    def edits(self) -> Iterator[WeightEdit]:
        """One edit for each constant that anything happens to."""
        for (node, index), (constant, stored, steps) in self._steps.items():
            yield WeightEdit(node, index, WeightTransform(constant, tuple(steps), stored_transposed=stored))
