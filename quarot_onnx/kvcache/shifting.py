"""Samples at later positions, so that what is measured behind RoPE holds over all positions of a model.

RoPE turns the pairs of a head from position to position, some of them once in six tokens, some once in a hundred
thousand: second moments that were taken on windows of 512 tokens are others at 4,096. Scores depend on distances alone,
so a window may stand anywhere: its position ids, or the positions that a RoPE taken out of a fused operator derives,
are raised by a shift. Shifts are spread evenly over the *logarithm* of the position: as much weight lies on positions
up to 512 as on those from 512 to the square of that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.inputs import InputRole
from quarot_onnx.graph.edit import Editor

USUAL_POSITIONS = 4096
"""Where neither a file nor a table says how many positions a model has."""

_RUNS = 16
"""So many runs at least, with samples at several positions where there are fewer of them."""

_FIRST = 8
"""The shortest shift."""

_GOLDEN = (5**0.5 - 1) / 2
_INPUT = "quarot/shift"


@dataclass(frozen=True, eq=False)
class Shifts:
    """How samples of one model are moved.

    Attributes:
        ids: The inputs that hold position ids.
        derived: Whether the graph has the input for positions that it derives itself.
        positions: How many there are.
    """

    ids: tuple[str, ...]
    derived: bool
    positions: int

    @classmethod
    def into(cls, model: ir.Model, derived: Sequence[ir.Value], positions: int | None) -> "Shifts":
        """Give a graph an input that raises positions which it derives itself.

        Args:
            model: The model; changed where there are such positions.
            derived: They, [batch, seq].
            positions: How many the model has; None where that is not known.
        """
        roles = ModelInputs.from_model(model, known=False).roles
        ids = tuple(name for name, role in roles.items() if role is InputRole.POSITIONS)
        own = [value for value in dict.fromkeys(derived) if not value.is_graph_input()]
        if own:
            editor = Editor(model)
            shift = ir.Value(name=_INPUT, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
            model.graph.inputs.append(shift)
            for value in own:
                editor.redirect(value, lambda positions: [editor.node("Add", [positions, shift], f"{_INPUT}/Add")])
        return cls(ids, bool(own), USUAL_POSITIONS if positions is None else positions)

    def moved(self, feeds: Feeds, shift: int) -> Feeds:
        """A sample at later positions."""
        moved = {name: feeds[name] + np.asarray(shift, feeds[name].dtype) for name in self.ids if name in feeds}
        return {**feeds, **moved, **({_INPUT: np.array(shift, np.int64)} if self.derived else {})}

    def room(self, feeds: Feeds) -> int:
        """How far a sample can be moved."""
        if not self.ids and not self.derived:
            return 0
        longest = max((array.shape[-1] for array in feeds.values() if array.ndim == 2), default=self.positions)
        return max(self.positions - longest, 0)

    def all(self, samples: Sequence[Feeds]) -> list[Feeds]:
        """Every sample at one position or more: one as it is, the others spread over the logarithm of positions."""
        times = max(-(-_RUNS // max(len(samples), 1)), 1)
        pairs = [feeds for feeds in samples for _ in range(times if self.room(feeds) else 1)]
        return [self.moved(feeds, self._shift(number, self.room(feeds))) for number, feeds in enumerate(pairs)]

    @staticmethod
    def _shift(number: int, room: int) -> int:
        if number == 0 or room <= _FIRST:
            return 0
        return int(_FIRST * (room / _FIRST) ** (number * _GOLDEN % 1))
