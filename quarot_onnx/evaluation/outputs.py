"""What a model puts out on given inputs: a decoder in prefill and decode, or any graph."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from quarot_onnx import runtime
from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.inputs import FLOATS, TensorSpec
from quarot_onnx.calibration.text import TokenIds
from quarot_onnx.errors import ModelError

Outputs = list[tuple[int, npt.NDArray[Any]]]
"""What a run puts out, each with its place among the outputs that are compared."""

_FREE_DIM = 4  # size given to every symbolic dimension of a graph that is no decoder


def run(session: Any, names: list[str] | None, feeds: Feeds) -> list[Any]:
    """Run a session.

    Raises:
        ModelError: onnxruntime fails; its message in one line.
    """
    try:
        return list(session.run(names, feeds))
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise ModelError(
            f"onnxruntime cannot run the model: {' '.join(str(error).split())}; where windows are longer "
            "than the model's positions, use shorter ones"
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
) -> Iterator[Outputs]:
    """A decoder's outputs, run by run: for each window a prefill, then single tokens on the model's own cache.

    Args:
        path: The ONNX file.
        inputs: Its inputs.
        groups: Windows ``[windows, prefill + decode_steps]``, one array for each length.
        names: The outputs that are wanted.
        at_end: Which of them are wanted of the last run of a window alone, as caches hold all positions then.
        decode_steps: Tokens at the end of every window that are fed one by one; needs a cache.
        threads: onnxruntime's intra-op threads.

    Yields:
        The outputs of a run, each with its place in ``names``.

    Raises:
        ModelError: The model cannot be run.
    """
    session = runtime.session(path, threads=threads, low_memory=True)
    presents = [present for _, present in inputs.presents] if decode_steps else []
    fetched = list(dict.fromkeys((*names, *presents)))
    for window in (window for group in groups for window in group):
        prefill = len(window) - decode_steps
        past: Feeds | None = None
        for start in (0, *range(prefill, len(window))):
            stop = prefill if start == 0 else start + 1
            feeds = inputs.feed(window[None, start:stop], past, start)
            outputs = dict(zip(fetched, run(session, fetched, feeds), strict=True))
            yield [(i, outputs[name]) for i, name in enumerate(names) if stop == len(window) or i not in at_end]
            past = inputs.present_to_past(outputs) if decode_steps else None


def float_outputs(
    path: str | Path, names: Sequence[str], feeds: Sequence[Feeds], threads: int | None
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

    Floats are standard normal, integers and booleans zeros and ones; a symbol is 4 wherever it occurs, its first place
    (the batch) 1.

    Raises:
        ModelError: An input of unknown rank or of a type that cannot be drawn.
    """
    specs = [TensorSpec.of(value) for value in model.graph.inputs if value.name not in model.graph.initializers]
    return [{spec.name: _draw(spec, rng) for spec in specs} for _ in range(count)]


def _draw(spec: TensorSpec, rng: np.random.Generator) -> npt.NDArray[Any]:
    if spec.shape is None or spec.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        raise ModelError(f"input {spec.name!r} ({spec.dtype.name}, shape {spec.shape}) cannot be drawn at random")
    shape = [dim if isinstance(dim, int) else (1 if axis == 0 else _FREE_DIM) for axis, dim in enumerate(spec.shape)]
    if spec.dtype in FLOATS:
        return rng.standard_normal(shape).astype(spec.dtype.numpy())
    return rng.integers(0, 2, shape).astype(spec.dtype.numpy())
