"""Group sizes that leave a remainder."""

from collections.abc import Iterator
from dataclasses import dataclass

from quarot_onnx.config.spec import QTensorConfig
from quarot_onnx.graph.query import label
from quarot_onnx.quantization.select import Selection

_USUAL = (16, 32, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class OddGroup:
    """A group size that does not divide a node's input features.

    Attributes:
        node: The node's name.
        features: Its input features.
        what: What has the groups: ``"weight"`` or ``"activation"``.
        size: The group size.
    """

    node: str
    features: int
    what: str
    size: int

    def message(self, said: str) -> str:
        """The error, with the way out.

        Args:
            said: The group size in the user's words.
        """
        fitting = [size for size in _USUAL if self.features % size == 0]
        fits = f"use a divisor, such as {' or '.join(map(str, fitting[-3:]))}" if fitting else "use a divisor"
        return (
            f"{said} does not divide the {self.features} input features of {self.node!r}; {fits}, have no groups, or "
            "leave the node in float (exclude, --exclude)"
        )


def odd_groups(selection: Selection) -> Iterator[OddGroup]:
    """All of them, in graph order, embeddings last."""
    for job in selection.linears:
        for what, spec in (("weight", job.config.weight), ("activation", job.config.activation)):
            yield from _odd(job.linear.name, job.linear.in_features, what, spec)
    for table in selection.tables:
        yield from _odd(label(table.node), table.table.shape[1], "weight", table.weight)


def _odd(node: str, features: int, what: str, spec: QTensorConfig | None) -> Iterator[OddGroup]:
    if spec is not None and spec.group_size is not None and features % spec.group_size:
        yield OddGroup(node, features, what, spec.group_size)
