"""A model's runs: what goes in, what comes out, whether the model is run whole or piece by piece.

They are told all at once: a model that is run piece by piece takes all of them through one before it opens the next.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.errors import FeedError, QuarotError
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.cuts import Piece
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.piecewise.sweep import Arrays, Plans, Run, Sweep
from quarot_onnx.progress import Progress
from quarot_onnx.sessions import runtime
from quarot_onnx.sessions.skeleton import open_augmented

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
        wide: Whether weights of float16 are fed as 32-bit floats; see `Sweep`.
        progress: Called with the runs done, of every piece, and their number.
    """

    model: ir.Model
    memory: Memory
    opening: Callable[[ir.Model], Any]
    wide: bool = False
    progress: Progress | None = None

    @cached_property
    def _plans(self) -> Plans:
        return Plans(self.model, self.memory.piece)

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

        with Sweep(self.model, given, self.memory, wide=self.wide, plans=self._plans) as sweep:
            for number in sweep.through(visit, outputs=names, progress=self.progress):
                wanted = [name for name in dict.fromkeys(names) if name not in given[number].skips]
                found = {name: sweep.take(number, name) for name in wanted}
                yield [found.get(name) for name in names]


def opened(
    path: str | Path,
    memory: Memory,
    *,
    model: ir.Model | None = None,
    threads: int | None = None,
    low_memory: bool = False,
    exact_products: bool = False,
    timed: bool = False,
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
        timed: Runs follow each other, and their time counts: whole, it is ready for them all; pieces, of which each is
            opened for one run, do not copy their weights.
        progress: Called where it is run piece by piece, with the runs done, of every piece, and their number.

    Raises:
        ModelError: It cannot be loaded.
        MissingPackageError: It uses onnxruntime-extensions and that is not installed.
    """
    fed = low_memory or timed
    opening = partial(open_augmented, threads=threads, low_memory=fed, exact_products=exact_products)
    if low_memory or memory.by_stages is not False:
        model = model_io.load(path) if model is None else model
        if memory.divides(model):
            return ByPieces(model, memory, opening, fed, progress)
        if low_memory:
            return Whole(opening(model))  # weights stay in their file, of which onnxruntime would copy a single one
    return Whole(
        runtime.session(path, threads=threads, low_memory=low_memory, exact_products=exact_products, timed=timed)
    )
