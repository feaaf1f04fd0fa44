"""What a model puts out on given inputs: a decoder's logits in prefill and decode, or any float outputs."""

from collections.abc import Iterator, Sequence
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

Rows = npt.NDArray[Any]

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


def decoder_logits(
    path: str | Path,
    inputs: ModelInputs,
    groups: Sequence[TokenIds],
    *,
    decode_steps: int,
    threads: int | None,
    low_memory: bool = True,
    exact_products: bool = False,
) -> Iterator[Rows]:
    """A decoder's logits, run by run: for each window a prefill, then single tokens on the model's own cache.

    Args:
        path: The ONNX file.
        inputs: Its inputs.
        groups: Windows ``[windows, prefill + decode_steps]``, one array for each length.
        decode_steps: Tokens at the end of every window that are fed one by one; needs a cache.
        threads: onnxruntime's intra-op threads.
        low_memory: As for ``runtime.session``.
        exact_products: As for ``runtime.session``.

    Yields:
        ``[tokens, vocab]``, the tokens of a prefill or the one of a decode step.

    Raises:
        ModelError: The model cannot be run.
    """
    session = runtime.session(path, threads=threads, low_memory=low_memory, exact_products=exact_products)
    presents = [present for _, present in inputs.presents] if decode_steps else []
    names = [inputs.logits, *presents]
    for window in (window for group in groups for window in group):
        prefill = len(window) - decode_steps
        past: Feeds | None = None
        for start in (0, *range(prefill, len(window))):
            stop = prefill if start == 0 else start + 1
            feeds = inputs.feed(window[None, start:stop], past, start)
            outputs = dict(zip(names, run(session, names, feeds), strict=True))
            yield outputs[inputs.logits][0]
            past = inputs.present_to_past(outputs) if decode_steps else None


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
