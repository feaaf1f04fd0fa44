"""A model's runs: what goes in, what comes out, whether the model is run whole or piece by piece.

Runs that follow one another on a cache (a prefill, then tokens one by one) are told all at once, each with what it
takes over from an earlier one. A model that is run piece by piece then takes all of them through a piece before it
opens the next: its weights are read once for all runs.
"""

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.errors import FeedError, QuarotError
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.cuts import Cuts, Piece, Wanted
from quarot_onnx.piecewise.memory import Memory, give_back, opened_bytes
from quarot_onnx.piecewise.states import Key, States
from quarot_onnx.progress import Progress
from quarot_onnx.sessions import runtime
from quarot_onnx.sessions.skeleton import open_augmented

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


Failed = Callable[[int, Arrays, Exception], QuarotError]
"""The error for a run that fails: its number, its own feeds, and what onnxruntime says."""


def not_run(_number: int, feeds: Arrays, error: Exception) -> QuarotError:
    """The error for inputs that onnxruntime cannot run."""
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in list(feeds.items())[:3])
    more = ", ..." if len(feeds) > 3 else ""
    return FeedError(f"onnxruntime cannot run the model on {shapes}{more}: {' '.join(str(error).split())}")


class Model(Protocol):
    """A model that can be run."""

    def outputs(self, runs: Iterable[Run], names: Sequence[str], failed: Failed = not_run) -> Iterator[list[Any]]:
        """The outputs of runs, in their order; None for one that a run skips.

        Args:
            runs: The runs.
            names: The outputs.
            failed: Makes the error for a run that fails.

        Raises:
            QuarotError: A run fails.
        """


class Whole:
    """A model in one session."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def outputs(self, runs: Iterable[Run], names: Sequence[str], failed: Failed = not_run) -> Iterator[list[Any]]:
        """See `Model`; a run can take over from the one before alone."""
        held: dict[str, NDArray[Any]] = {}
        for number, run in enumerate(runs):
            feeds = {**run.feeds, **{name: carried.of(held[carried.output]) for name, carried in run.carried.items()}}
            wanted = [name for name in names if name not in run.skips]
            fetched = list(dict.fromkeys((*wanted, *run.keeps)))
            try:
                found = dict(zip(fetched, self._session.run(fetched, feeds), strict=True))
            except Exception as error:  # onnxruntime's exceptions share no other base
                raise failed(number, feeds, error) from error
            held = {name: found[name] for name in run.keeps}
            yield [None if name in run.skips else found[name] for name in names]


@dataclass(frozen=True, eq=False)
class ByPieces:
    """A model whose pieces are opened one after the other.

    Attributes:
        model: The model, its large weights external.
        memory: How large pieces and states may be.
        opening: Opens a piece.
        progress: Called with the runs done, of every piece, and their number.
    """

    model: ir.Model
    memory: Memory
    opening: Callable[[ir.Model], Any]
    progress: Progress | None = None

    def outputs(self, runs: Iterable[Run], names: Sequence[str], failed: Failed = not_run) -> Iterator[list[Any]]:
        """See `Model`."""
        given = list(runs)

        def visit(piece: Piece) -> Callable[[int, Arrays], list[Any]]:
            session = self.opening(piece.model)

            def run(number: int, feeds: Arrays) -> list[Any]:
                try:
                    return list(session.run(None, dict(feeds)))
                except Exception as error:  # onnxruntime's exceptions share no other base
                    raise failed(number, given[number].feeds, error) from error

            return run

        with Sweep(self.model, given, self.memory) as sweep:
            for number in sweep.through(visit, outputs=names, progress=self.progress):
                wanted = [name for name in dict.fromkeys(names) if name not in given[number].skips]
                found = {name: sweep.take(number, name) for name in wanted}
                yield [found.get(name) for name in names]


class Sweep:
    """Takes runs through the pieces of a model; to be closed by ``with``."""

    def __init__(self, model: ir.Model, runs: Sequence[Run], memory: Memory) -> None:
        """Nothing is run yet.

        Args:
            model: The model, its large weights external.
            runs: The runs.
            memory: How large pieces and states may be.
        """
        self._model, self._runs, self._memory = model, runs, memory
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
        cuts = Cuts(self._model, Wanted(outputs, observed, sorted(pasts), fed), self._memory.piece)
        if len(cuts) == 1 and opened_bytes(self._model) > self._memory.piece:
            _LOG.warning("the graph %r has no place where it can be cut: it is run whole", self._model.graph.name)
        else:
            _LOG.info("the graph %r is run in %d pieces", self._model.graph.name, len(cuts))
        for place, piece in enumerate(cuts, 1):
            self._type(piece)
            run_piece = visit(piece)
            for number, run in enumerate(self._runs):
                if piece.outputs or piece.observed:
                    feeds = {name: self._input(name, number, run) for name in piece.inputs}
                    self._keep(piece, number, run_piece(number, feeds), outputs)
                if progress is not None:
                    progress((place - 1) * len(self._runs) + number + 1, len(cuts) * len(self._runs))
                if place == len(cuts):
                    yield number
            del run_piece
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
        for number, run in enumerate(self._runs):
            for name in piece.expires:
                if name not in wanted or name in run.skips:
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


def opened(
    path: str | Path,
    memory: Memory,
    *,
    model: ir.Model | None = None,
    threads: int | None = None,
    low_memory: bool = False,
    exact_products: bool = False,
    progress: Progress | None = None,
) -> Model:
    """A model ready to run, whole or piece by piece as it fits.

    Args:
        path: Its file.
        memory: What it may take.
        model: What was loaded of the file, where it was.
        threads: onnxruntime's intra-op threads.
        low_memory: Do not copy the weights into packed form.
        exact_products: Compute 8-bit products without saturation.
        progress: Called where it is run piece by piece, with the runs done, of every piece, and their number.

    Raises:
        ModelError: It cannot be loaded.
        MissingPackageError: It uses onnxruntime-extensions and that is not installed.
    """
    opening = partial(open_augmented, threads=threads, low_memory=low_memory, exact_products=exact_products)
    if low_memory or memory.by_stages is not False:
        model = model_io.load(path) if model is None else model
        if memory.divides(model):
            return ByPieces(model, memory, opening, progress)
        if low_memory:
            return Whole(opening(model))  # weights stay in their file, of which onnxruntime would copy a single one
    return Whole(runtime.session(path, threads=threads, low_memory=low_memory, exact_products=exact_products))
