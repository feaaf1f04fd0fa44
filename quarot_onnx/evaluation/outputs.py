"""What a model puts out on given inputs: a decoder in prefill and decode, or any graph."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
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
from quarot_onnx.sessions import runtime

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
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in list(feeds.items())[:3])
        more = ", ..." if len(feeds) > 3 else ""
        raise FeedError(
            f"onnxruntime cannot run the model on {shapes}{more}: {' '.join(str(error).split())}"
        ) from error


def decoder_outputs(
    path: str | Path,
    inputs: ModelInputs,
    groups: Sequence[TokenIds],
    names: Sequence[str],
    *,
    at_end: Collection[int],
    decode_steps: int,
    threads: int | None,
    then: Callable[[Any], None] | None = None,
    before: Before | None = None,
) -> Iterator[Outputs]:
    """A decoder's outputs, run by run: for each window a prefill, then single tokens on the model's own cache.

    Args:
        path: The ONNX file.
        inputs: Its inputs.
        groups: Windows ``[windows, prefill + decode_steps]``, one array for each length.
        names: The outputs that are wanted.
        at_end: Which of them are wanted of the last run of a window alone, as caches hold all positions then.
        decode_steps: Tokens at the end of every window that are fed one by one; needs a cache. Where the graph fixes
            the length of a run, windows are run in pieces of it.
        threads: onnxruntime's intra-op threads.
        then: Called with the session after the last run.
        before: A prefix that is fed before every window, and of which nothing is put out.

    Yields:
        The outputs of a run, each with its place in ``names``.

    Raises:
        CalibrationError: Windows of a length that the graph does not take.
        ModelError: The model cannot be run.
    """
    session = runtime.session(path, threads=threads, low_memory=True)
    rows = inputs.lengths.batch or 1
    for group in groups:
        for windows in (group[i : i + rows] for i in range(0, len(group), rows)):
            last = len(pieces(inputs, windows.shape[1], decode_steps)) - 1
            runs = window_outputs(session, inputs, windows, list(names), decode_steps, before=before)
            for number, outputs in enumerate(runs):
                yield [(i, output) for i, output in enumerate(outputs) if number == last or i not in at_end]
    if then is not None:
        then(session)


def window_outputs(
    session: Any,
    inputs: ModelInputs,
    windows: TokenIds,
    names: list[str],
    decode_steps: int = 0,
    *,
    before: Before | None = None,
) -> Iterator[list[Any]]:
    """The outputs of one batch of windows, run by run, each on the cache of those before it.

    Args:
        session: A session of the model.
        inputs: Its inputs.
        windows: ``[rows, seq]``, not more rows than the graph takes.
        names: The outputs.
        decode_steps: As for ``decoder_outputs``.
        before: As there.

    Raises:
        CalibrationError: A length that the graph does not take.
        ModelError: The model cannot be run.
    """
    before = before or Before()
    windows = before.windows(windows)
    runs = pieces(inputs, windows.shape[1], decode_steps)
    caches = [present for _, present in inputs.presents]
    presents = caches if len(runs) > 1 else []
    fetched = list(dict.fromkeys((*names, *presents)))
    past, held = (None, 0) if before.past is None else (before.past.filled(len(windows)), before.past.fed_length)
    for number, (start, stop) in enumerate(runs):
        feeds = inputs.feed(windows[:, start:stop], past, held + start)
        outputs = dict(zip(fetched, run(session, fetched, feeds), strict=True))
        yield [before.without(name, outputs[name], caches, first=number == 0) for name in names]
        past = inputs.present_to_past(outputs) if presents else None


def float_outputs(
    path: str | Path, names: Sequence[str], feeds: Iterable[Feeds], threads: int | None
) -> Iterator[Outputs]:
    """A graph's outputs on each feed, each with its place in ``names``.

    Raises:
        ModelError: The model cannot be run.
    """
    session = runtime.session(path, threads=threads, low_memory=True)
    for feed in feeds:
        yield list(enumerate(run(session, list(names), feed)))


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
