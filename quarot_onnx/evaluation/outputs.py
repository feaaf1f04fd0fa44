"""What a model puts out on given inputs: a decoder's logits in prefill and decode, or any float outputs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from quarot_onnx import runtime
from quarot_onnx.calibration.feeds import Feeds, ModelInputs, logits_output
from quarot_onnx.calibration.inputs import FLOATS, TensorSpec
from quarot_onnx.calibration.pieces import pieces
from quarot_onnx.calibration.text import TokenIds
from quarot_onnx.errors import FeedError, ModelError

Rows = npt.NDArray[Any]

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


def decoder_logits(
    path: str | Path, inputs: ModelInputs, groups: Sequence[TokenIds], *, decode_steps: int, threads: int | None
) -> Iterator[Rows]:
    """A decoder's logits, run by run: for each window a prefill, then single tokens on the model's own cache.

    Args:
        path: The ONNX file.
        inputs: Its inputs.
        groups: Windows ``[windows, prefill + decode_steps]``, one array for each length.
        decode_steps: Tokens at the end of every window that are fed one by one; needs a cache. Where the graph fixes
            the length of a run, windows are run in pieces of it.
        threads: onnxruntime's intra-op threads.

    Yields:
        ``[tokens, vocab]``, the tokens of a prefill or the one of a decode step.

    Raises:
        CalibrationError: Windows of a length that the graph does not take.
        ModelError: The model cannot be run.
    """
    session = runtime.session(path, threads=threads, low_memory=True)
    rows = inputs.lengths.batch or 1
    for group in groups:
        for windows in (group[i : i + rows] for i in range(0, len(group), rows)):
            for logits in window_logits(session, inputs, windows, decode_steps):
                yield from logits


def window_logits(session: Any, inputs: ModelInputs, windows: TokenIds, decode_steps: int = 0) -> Iterator[Rows]:
    """The logits of one batch of windows, run by run, each on the cache of those before it.

    Args:
        session: A session of the model.
        inputs: Its inputs.
        windows: ``[rows, seq]``, not more rows than the graph takes.
        decode_steps: As for ``decoder_logits``.

    Yields:
        ``[rows, tokens, vocab]``.

    Raises:
        CalibrationError: A length that the graph does not take.
        ModelError: The model cannot be run.
    """
    runs = pieces(inputs, windows.shape[1], decode_steps)
    presents = [present for _, present in inputs.presents] if len(runs) > 1 else []
    names = [inputs.logits, *presents]
    past: Feeds | None = None
    for start, stop in runs:
        outputs = dict(zip(names, run(session, names, inputs.feed(windows[:, start:stop], past, start)), strict=True))
        yield outputs[inputs.logits][: len(windows)]
        past = inputs.present_to_past(outputs) if presents else None


def float_outputs(
    path: str | Path, names: Sequence[str], feeds: Sequence[Feeds], threads: int | None
) -> Iterator[Rows]:
    """A graph's float outputs on each feed, flattened to ``[rows, last dimension]``.

    Raises:
        ModelError: The model cannot be run.
    """
    session = runtime.session(path, threads=threads, low_memory=True)
    for feed in feeds:
        for output in run(session, list(names), feed):
            yield output.reshape(-1, output.shape[-1] if output.ndim else 1)


def float_output_names(model: ir.Model) -> list[str]:
    """The graph's float outputs.

    Raises:
        ModelError: There is none.
    """
    names = [value.name or "" for value in model.graph.outputs if value.dtype is None or value.dtype in FLOATS]
    if not names:
        raise ModelError("the graph has no float output to compare")
    return names


def compared_outputs(model: ir.Model, *, decoder: bool) -> list[str]:
    """What is compared where the inputs are given: a decoder's logits, or all float outputs that are no caches.

    Raises:
        ModelError: There is none.
    """
    names = float_output_names(model)
    if decoder:
        return [logits_output([TensorSpec.of(value) for value in model.graph.outputs]).name]
    cached = any(value.shape is not None and len(value.shape) == 4 for value in model.graph.inputs)
    caches = {value.name for value in model.graph.outputs if value.shape is not None and len(value.shape) == 4}
    return [name for name in names if not (cached and name in caches)] or names


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
