"""Runs taken through the pieces of a model, one piece after the other.

Runs that follow one another on a cache (a prefill, then tokens one by one) are told all at once, each with what it
takes over from an earlier one. All of them go through a piece before the next one is opened: its weights are read once
for all runs.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.io.memory import reused
from quarot_onnx.piecewise.cuts import Cuts, Piece, Wanted
from quarot_onnx.piecewise.memory import Memory, give_back, opened_bytes
from quarot_onnx.piecewise.states import Key, States
from quarot_onnx.piecewise.wide import read_wide
from quarot_onnx.progress import Progress
from quarot_onnx.sessions import providers

Arrays = Mapping[str, NDArray[Any]]

_LOG = logging.getLogger("quarot_onnx")


@dataclass(frozen=True, eq=False)
class Carried:
    """An input that an earlier run puts out.

    Attributes:
        output: The output.
        dtype: The input's type.
        columns: What of it is taken; empty for all.
        back: How many runs before.
    """

    output: str
    dtype: np.dtype[Any]
    columns: tuple[slice, ...] = ()
    back: int = 1

    def of(self, array: NDArray[Any]) -> NDArray[Any]:
        """The input."""
        return np.ascontiguousarray(array[self.columns], dtype=self.dtype)


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a model.

    Attributes:
        feeds: Input name to array.
        carried: Inputs that come from earlier runs.
        keeps: Outputs that the next run takes.
        skips: Outputs that are not wanted of this run.
    """

    feeds: Arrays
    carried: Mapping[str, Carried] = field(default_factory=dict)
    keeps: tuple[str, ...] = ()
    skips: frozenset[str] = frozenset()


class Plans:
    """How a model is cut for what it is run for: found once, where it is run again and again."""

    def __init__(self, model: ir.Model, limit: int) -> None:
        """Nothing is found yet; arguments as for `Cuts`."""
        self._model, self._limit = model, limit
        self._found: dict[object, Cuts] = {}

    def of(self, wanted: Wanted) -> Cuts:
        """The pieces."""
        key = (*map(tuple, (wanted.outputs, wanted.observed, wanted.pasts)), frozenset(wanted.fed), wanted.wide)
        if key not in self._found:
            cuts = self._found[key] = Cuts(self._model, wanted, self._limit)
            if len(cuts) == 1 and opened_bytes(self._model) > self._limit:
                _LOG.warning("the graph %r has no place where it can be cut: it is run whole", self._model.graph.name)
            else:
                _LOG.info("the graph %r is run in %d pieces", self._model.graph.name, len(cuts))
        return self._found[key]


class Sweep:
    """Takes runs through the pieces of a model; to be closed by ``with``."""

    def __init__(
        self, model: ir.Model, runs: Sequence[Run], memory: Memory, *, wide: bool, plans: Plans | None = None
    ) -> None:
        """Nothing is run yet.

        Args:
            model: The model, its large weights external.
            runs: The runs.
            memory: How large pieces and states may be.
            wide: Whether weights of float16 are fed as the 32-bit floats that onnxruntime makes of them on a CPU; not
                for sessions that would pack them, and add in another order.
            plans: How the model is cut, where it is run more than once.
        """
        self._model, self._runs = model, runs
        self._plans = plans or Plans(model, memory.piece)
        self._wide = wide and providers.current().name == providers.CPU
        self._taken: dict[Key, list[tuple[slice, ...]]] = {}
        for i, run in enumerate(runs):
            for item in run.carried.values():
                self._taken.setdefault((i - item.back, item.output), []).append(item.columns)
        self._folder = tempfile.TemporaryDirectory(prefix="quarot-states-")
        self._states = States(Path(self._folder.name) / "states", memory.states)

    def __enter__(self) -> "Sweep":
        """The sweep itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Remove what lies on disk."""
        self._folder.cleanup()

    def through(
        self,
        visit: Callable[[Piece], Callable[[int, Arrays], list[Any]]],
        *,
        outputs: Sequence[str] = (),
        observed: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> Iterator[int]:
        """Take all runs through one piece after the other.

        Args:
            visit: Opens a piece and gives what runs it: a run's number and the piece's inputs to the piece's outputs.
            outputs: The outputs that are wanted.
            observed: Values that are looked at.
            progress: Called with the runs done, of every piece, and their number.

        Yields:
            The number of each run that went through the last piece; its outputs can be taken then.
        """
        fed = {name for run in self._runs for name in run.feeds if name in self._model.graph.initializers}
        pasts = {(name, carried.output) for run in self._runs for name, carried in run.carried.items()}
        wanted = Wanted(outputs, observed, sorted(pasts), fed, wide=self._wide)
        cuts = self._plans.of(wanted)
        with reused():
            for place, piece in enumerate(cuts, 1):
                self._type(piece)
                run_piece = visit(piece)
                weights = {name: read_wide(tensor) for name, tensor in piece.weights.items()}
                for number, run in enumerate(self._runs):
                    if piece.outputs or piece.observed:
                        feeds = {name: self._input(name, number, run) for name in piece.inputs}
                        self._keep(piece, number, run_piece(number, {**feeds, **weights}), outputs)
                    if progress is not None:
                        progress((place - 1) * len(self._runs) + number + 1, len(cuts) * len(self._runs))
                    if place == len(cuts):
                        yield number
                del run_piece, weights
                self._forget(piece, outputs)
                give_back()

    def _keep(self, piece: Piece, number: int, arrays: list[Any], wanted: Sequence[str]) -> None:
        """Keep what a run through a piece leaves, as far as anybody needs it."""
        skips = self._runs[number].skips
        for name, array in zip(piece.outputs, arrays, strict=True):
            whole = (name in wanted and name not in skips) or name in piece.read
            if whole or (number, name) in self._taken:
                self._states[number, name] = array if whole else _reached(array, self._taken[number, name])

    def _forget(self, piece: Piece, wanted: Sequence[str]) -> None:
        """Forget what nobody needs any more."""
        expired, held = frozenset(piece.expires), self._states.keys()
        for number, name in held:
            if name in expired and (name not in wanted or name in self._runs[number].skips):
                self._states.discard((number, name))

    def take(self, number: int, name: str) -> NDArray[Any]:
        """An output of a run, which is forgotten with that unless a later run takes it over."""
        array = self._states[number, name]
        if (number, name) not in self._taken:
            self._states.discard((number, name))
        return array

    def _input(self, name: str, number: int, run: Run) -> NDArray[Any]:
        carried = run.carried.get(name)
        if carried is not None:
            return carried.of(self._states[number - carried.back, carried.output])
        return run.feeds[name] if name in run.feeds else self._states[number, name]

    def _type(self, piece: Piece) -> None:
        """Give inputs of a piece whose types nothing tells those of the arrays."""
        for value in piece.model.graph.inputs:
            if value.type is None and self._runs:
                array = self._input(str(value.name), 0, self._runs[0])
                value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))


def _reached(array: NDArray[Any], taken: Sequence[tuple[slice, ...]]) -> NDArray[Any]:
    """What later runs take of an output, where that is its beginning."""
    begins = all(columns and columns[-1].start is None for columns in taken)
    return np.ascontiguousarray(array[max(taken, key=lambda columns: columns[-1].stop)]) if begins else array
