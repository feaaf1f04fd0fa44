"""What a model puts out on given inputs: a decoder in prefill and decode, or any graph."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.inputs import FLOATS, TensorSpec
from quarot_onnx.calibration.pieces import pieces
from quarot_onnx.calibration.text import TokenIds
from quarot_onnx.errors import FeedError
from quarot_onnx.evaluation.before import Before
from quarot_onnx.piecewise.runs import Model, not_run
from quarot_onnx.piecewise.sweep import Run

Outputs = list[tuple[int, npt.NDArray[Any]]]
"""What a run puts out, each with its place among the outputs that are compared."""

_FREE_DIM = 4  # size given to every symbolic dimension of a graph that is no decoder


def run(session: Any, names: list[str] | None, feeds: Feeds) -> list[Any]:
    """Run a session.

    Raises:
        FeedError: onnxruntime fails; its message in one line.
    """
    try:
        return list(session.run(names, feeds))
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise not_run(0, feeds, error) from error


def decoder_outputs(
    opening: Callable[[], Model],
    inputs: ModelInputs,
    groups: Sequence[TokenIds],
    names: Sequence[str],
    *,
    at_end: Collection[int],
    decode_steps: int,
    rows: int = 1,
    then: Callable[[Model], None] | None = None,
    before: Before | None = None,
) -> Iterator[Outputs]:
    """A decoder's outputs, run by run: for each window a prefill, then single tokens on the model's own cache.

    Args:
        opening: Opens the model, which is closed after its last run.
        inputs: Its inputs.
        groups: Windows ``[windows, prefill + decode_steps]``, one array for each length.
        names: The outputs that are wanted.
        at_end: Which of them are wanted of the last run of a window alone, as caches hold all positions then.
        decode_steps: Tokens at the end of every window that are fed one by one; needs a cache. Where the graph fixes
            the length of a run, windows are run in pieces of it.
        rows: Windows that are run at once, where the graph does not fix that.
        then: Called with the model after the last run.
        before: A prefix that is fed before every window, and of which nothing is put out.

    Yields:
        The outputs of a run, each with its place in ``names``.

    Raises:
        CalibrationError: Windows of a length that the graph does not take.
        ModelError: The model cannot be run.
    """
    model, rows = opening(), inputs.lengths.batch or rows
    batches = [group[i : i + rows] for group in groups for i in range(0, len(group), rows)]
    late = frozenset(names[i] for i in at_end)
    for _, outputs in windows_outputs(model, inputs, batches, names, decode_steps, before=before, at_end=late):
        yield [(i, output) for i, output in enumerate(outputs) if output is not None]
    if then is not None:
        then(model)


@dataclass(frozen=True)
class Place:
    """A run among those of its batch of windows.

    Attributes:
        first: It is the first.
        last: It is the last.
        tokens: How many are fed in it.
    """

    first: bool
    last: bool
    tokens: int


def windows_outputs(
    model: Model,
    inputs: ModelInputs,
    batches: Iterable[TokenIds],
    names: Sequence[str],
    decode_steps: int = 0,
    *,
    before: Before | None = None,
    at_end: frozenset[str] = frozenset(),
) -> Iterator[tuple[Place, list[Any]]]:
    """The outputs of batches of windows, run by run, each on the cache of those before it.

    Args:
        model: The model.
        inputs: Its inputs.
        batches: ``[rows, seq]`` each, not more rows than the graph takes.
        names: The outputs.
        decode_steps: As for ``decoder_outputs``.
        before: As there.
        at_end: Outputs that are wanted of the last run of a batch alone; None stands for them before.

    Raises:
        CalibrationError: A length that the graph does not take.
        ModelError: The model cannot be run.
    """
    before, caches = before or Before(), [present for _, present in inputs.presents]
    places: deque[Place] = deque()

    def runs() -> Iterator[Run]:
        for windows in batches:
            found = window_runs(inputs, windows, decode_steps, before, at_end)
            fed = [item.feeds[inputs.tokens].shape[1] for item in found]
            places.extend(Place(n == 0, n + 1 == len(found), tokens) for n, tokens in enumerate(fed))
            yield from found

    for outputs in model.outputs(runs(), names):
        place = places.popleft()
        whole = zip(names, outputs, strict=True)
        yield (
            place,
            [
                None if output is None else before.without(name, output, caches, fed=place.tokens if place.first else 0)
                for name, output in whole
            ],
        )


def window_runs(
    inputs: ModelInputs, windows: TokenIds, decode_steps: int, before: Before, at_end: frozenset[str]
) -> list[Run]:
    """The runs of one batch of windows; arguments are those of ``windows_outputs``."""
    windows = before.windows(windows)
    past, held = (None, 0) if before.past is None else (before.past.past, before.past.fed_length)
    runs: list[Run] = []
    found = pieces(inputs, windows.shape[1], decode_steps)
    for number, (start, stop) in enumerate(found):
        feeds = inputs.feed(windows[:, start:stop], past, held + start)
        carried = inputs.carried(feeds) if number else {}
        # Where later runs have the cache of those before them, only its type is asked of what is fed here.
        past = {name: feeds[name] for name, _ in inputs.presents}
        own = {name: array for name, array in feeds.items() if name not in carried}
        last = number + 1 == len(found)
        keeps = () if last else tuple(present for _, present in inputs.presents)
        runs.append(Run(own, carried, keeps, frozenset() if last else at_end))
    return runs


def float_outputs(opening: Callable[[], Model], names: Sequence[str], feeds: Iterable[Feeds]) -> Iterator[Outputs]:
    """A graph's outputs on each feed, each with its place in ``names``.

    Raises:
        ModelError: The model cannot be run.
    """
    for outputs in opening().outputs(map(Run, feeds), names):
        yield list(enumerate(outputs))


def random_feeds(model: ir.Model, count: int, rng: np.random.Generator) -> list[Feeds]:
    """Random feeds for a graph that is no decoder.

    Floats are standard normal, integers and booleans zeros and ones. A symbol has one size wherever it occurs: 1 where
    it is the first axis of an input of two axes or more (the batch), else 4; a sum of symbols is the sum of theirs.

    Raises:
        FeedError: An input of unknown rank or of a type that cannot be drawn.
    """
    specs = [TensorSpec.of(value) for value in model.graph.inputs if value.name not in model.graph.initializers]
    firsts = {spec.shape[0] for spec in specs if spec.shape is not None and len(spec.shape) > 1}
    batches = {dim for dim in firsts if isinstance(dim, str)}
    return [{spec.name: _draw(spec, batches, rng) for spec in specs} for _ in range(count)]


def _draw(spec: TensorSpec, batches: set[str], rng: np.random.Generator) -> npt.NDArray[Any]:
    if spec.shape is None or spec.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        raise FeedError(f"input {spec.name!r} ({spec.dtype.name}, shape {spec.shape}) cannot be drawn at random")
    shape = [_size(dim, axis, batches) for axis, dim in enumerate(spec.shape)]
    if spec.dtype in FLOATS:
        return rng.standard_normal(shape).astype(spec.dtype.numpy())
    return rng.integers(0, 2, shape).astype(spec.dtype.numpy())


def _size(dim: int | str | None, axis: int, batches: set[str]) -> int:
    """The size of a dimension."""
    if isinstance(dim, int):
        return dim
    if dim is None:
        return 1 if axis == 0 else _FREE_DIM
    terms = [term.strip() for term in dim.split("+")]
    return sum(int(term) if term.isdigit() else 1 if term in batches else _FREE_DIM for term in terms)
