"""Names that nothing in a model has yet."""

import onnx_ir as ir

from quarot_onnx.io.nodes import all_graphs


class Names:
    """The names of a model's values and nodes, those of subgraphs among them."""

    def __init__(self, model: ir.Model) -> None:
        """Take stock of the names in use."""
        self._taken: set[str] = set()
        for graph in all_graphs(model):
            self._taken.update(value.name for value in graph.inputs if value.name)
            self._taken.update(name for name in graph.initializers if name)
            for node in graph:
                self._taken.update(value.name for value in node.outputs if value.name)
                if node.name:
                    self._taken.add(node.name)
        self._number = 0

    def unique(self, stem: str) -> str:
        """A new name, ``stem`` itself or with a number; from now on it is in use."""
        name = stem
        while name in self._taken:
            self._number += 1
            name = f"{stem}_{self._number}"
        self._taken.add(name)
        return name
