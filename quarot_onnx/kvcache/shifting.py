"""Samples at later positions, so that what is measured behind RoPE holds over all positions of a model.

RoPE turns the pairs of a head from position to position, some of them once in six tokens, some once in a hundred
thousand: second moments that were taken on windows of 512 tokens are others at 4,096. Scores depend on distances alone,
so a window may stand anywhere: its position ids, or the positions that a RoPE taken out of a fused operator derives,
are raised by a shift. Shifts are spread evenly over the *logarithm* of the position: as much weight lies on positions
up to 512 as on those from 512 to the square of that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import onnx_ir as ir

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.inputs import InputRole
from quarot_onnx.calibration.observing import Observer
from quarot_onnx.calibration.padding import Sample
from quarot_onnx.graph.edit import Editor
from quarot_onnx.graph.query import consumers

USUAL_POSITIONS = 4096
"""Where neither a file nor a table says how many positions a model has."""

_RUNS = 16
"""So many runs at least, with samples at several positions where there are fewer of them."""

_FIRST = 8
"""The shortest shift."""

_GOLDEN = (5**0.5 - 1) / 2
_ALIKE = 0.05
"""Of what keys are allowed to differ: cosines of late positions are inexact in float16."""

_INPUT = "quarot/shift"


class Sums(Protocol):
    """What an observer adds to."""

    def size(self) -> float:
        """The sum of the squares of all keys so far, which RoPE leaves as they are."""

    def clear(self) -> None:
        """Forget all."""


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
                users = consumers(value)
                node = editor.node("Add", [value, shift], f"{_INPUT}/Add")
                editor.after_value(value, [node])
                for user, index in users:
                    user.replace_input_with(index, node.outputs[0])
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


class Shifted:
    """Shows an observer every sample at one position or more."""

    def __init__(self, observer: Observer, sums: Sums, shifts: Shifts, samples: int | None) -> None:
        """Wrap an observer.

        Args:
            observer: It.
            sums: What it adds to: where a shift changes keys by more than a turn, the graph uses its positions for
                something else, too, and samples stay where they are.
            shifts: How samples are moved.
            samples: How many there will be; None where that is not known.
        """
        self._observer, self._sums, self._shifts = observer, sums, shifts
        self._times = 2 if samples is None else max(-(-_RUNS // max(samples, 1)), 1)
        self._runs, self._moves = 0, True

    def observe(self, sample: Sample) -> None:
        """Run one sample, at as many positions as it takes."""
        room = self._shifts.room(sample.feeds) if self._moves else 0
        if room and not self._runs:
            self._moves = self._only_turns(sample, room)
            room = room if self._moves else 0
        for _ in range(self._times if room else 1):
            self._run(sample, self._next(room))

    def _run(self, sample: Sample, shift: int) -> None:
        self._observer.observe(replace(sample, feeds=self._shifts.moved(sample.feeds, shift)))

    def _only_turns(self, sample: Sample, room: int) -> bool:
        """Whether the keys of a sample that is moved as far as it goes are as long as they were."""
        sizes = []
        for shift in (0, room):
            self._sums.clear()
            self._run(sample, shift)
            sizes.append(self._sums.size())
        self._sums.clear()
        return abs(sizes[1] - sizes[0]) <= _ALIKE * sizes[0]

    def _next(self, room: int) -> int:
        """The next shift: none at first, then evenly spread over logarithms."""
        number, self._runs = self._runs, self._runs + 1
        if number == 0 or room <= _FIRST:
            return 0
        return int(_FIRST * (room / _FIRST) ** (number * _GOLDEN % 1))
