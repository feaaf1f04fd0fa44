"""Run two models over the same inputs and measure, output by output, how far they are apart."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from quarot_onnx.calibration.inputs import FLOATS
from quarot_onnx.errors import ModelError
from quarot_onnx.evaluation.kept import kept
from quarot_onnx.evaluation.logits import readable
from quarot_onnx.evaluation.measures import Measures
from quarot_onnx.evaluation.outputs import Outputs
from quarot_onnx.evaluation.pairing import Compared, Pairing
from quarot_onnx.graph.linear import linears
from quarot_onnx.graph.query import label
from quarot_onnx.io import model_io
from quarot_onnx.threads import one_blas_thread

Rows = npt.NDArray[Any]


@dataclass
class Measured:
    """One output of both models.

    Attributes:
        compared: The output.
        dtype: Its type, the coarser of both.
        main: It is a decoder's logits.
        measures: The figures.
    """

    compared: Compared
    dtype: np.dtype[Any]
    main: bool
    measures: Measures


@dataclass(frozen=True)
class Figures:
    """All outputs.

    Attributes:
        main: A decoder's logits; of other graphs all outputs together.
        outputs: Each one.
        left: Outputs that turned out not to compare, with the reason.
    """

    main: Measures
    outputs: tuple[Measured, ...]
    left: dict[str, str]


def measure(
    pairing: Pairing,
    runs_a: Iterator[Outputs],
    runs_b: Iterator[Outputs],
    paths: tuple[str | Path, str | Path],
    *,
    decoder: bool,
) -> Figures:
    """Run one model to its end, its outputs into a file, then the other against it.

    Args:
        pairing: What is compared.
        runs_a: The runs of the first model.
        runs_b: Those of the second.
        paths: Of both, for messages.
        decoder: Whether the first output is a decoder's logits.

    Raises:
        ModelError: The first model's main outputs are not finite, or the shapes differ.
    """
    main, found, left = Measures(distributions=decoder), dict[int, Measured](), dict[str, str]()
    kinds: list[tuple[int, np.dtype[Any]]] = []
    with kept() as first, one_blas_thread():  # caches are turned back in products too small to share
        for place, output in _floats(runs_a):
            rows = pairing.outputs[place].rows(output, 0)
            kinds.append((place, output.dtype))
            first.put(_checked(rows, paths[0], decoder=decoder, main=place == 0))
        for (place, dtype), (_, output) in zip(kinds, _floats(runs_b), strict=True):
            compared = pairing.outputs[place]
            stored, rows = first.take(), compared.rows(output, 1)
            if rows.shape != stored.shape and compared.cache:
                left[compared.name] = f"the shapes {list(stored.shape)} and {list(rows.shape)} differ"
                continue
            if rows.shape != stored.shape:
                raise ModelError(
                    f"{paths[0]} puts out {list(stored.shape)} as {compared.name!r}, {paths[1]} {list(rows.shape)}: "
                    "different models"
                )
            is_main = decoder and place == 0
            if place not in found:
                coarser = min(dtype, output.dtype, key=lambda kind: kind.itemsize)
                found[place] = Measured(compared, coarser, is_main, main if is_main else Measures(distributions=False))
            if not is_main:
                found[place].measures.add(*_finite(stored, rows))
            if is_main or not decoder:
                finite = readable(rows) if is_main else None
                main.add(stored, rows if finite is None else finite)
    compared_all = (item for item in found.values() if item.compared.name not in left)
    return Figures(main, tuple(compared_all), left)


def _checked(rows: Rows, path: str | Path, *, decoder: bool, main: bool) -> Rows:
    """An output of the first model; what beside a decoder's logits is not finite is judged with the second's."""
    if decoder:
        return own_logits(rows, path) if main else rows
    if not np.isfinite(rows).all():
        raise _wild(path)
    return rows


def own_logits(rows: Rows, path: str | Path) -> Rows:
    """The logits ``[tokens, vocab]`` of an original, all finite: see `readable`.

    Raises:
        ModelError: No distribution can be read of them.
    """
    finite = readable(rows)
    if finite is None:
        raise _wild(path)
    return finite


def _wild(path: str | Path) -> ModelError:
    what = f"{path} puts out NaN or infinity on its own"
    weight = _wild_weight(model_io.load(path))
    if weight:
        return ModelError(
            f"{what}: {weight} holds some, and nothing can be made of it, rotated or quantized; export the model again"
        )
    return ModelError(
        f"{what}: there is nothing to compare with; if that is as it should be, --no-verify rotates, and --no-check "
        "quantizes, without a comparison"
    )


def _wild_weight(model: ir.Model) -> str:
    """The first weight that holds NaN, or of a Linear infinity, in words; empty where none does."""
    of_linears = {linear.weight.value: linear for linear in linears(model.graph)}
    for value in model.graph.initializers.values():
        tensor, readers = value.const_value, value.consumers()
        if tensor is None or tensor.dtype not in FLOATS or not readers:
            continue
        array = model_io.read_array(tensor, own=False)
        # Elsewhere infinity may stand for what must not be seen.
        if np.isnan(array).any() or (value in of_linears and not np.isfinite(array).all()):
            reader = of_linears[value].node if value in of_linears else readers[0]
            return f"the weight {value.name!r} of {label(reader)!r}"
    return ""


def _floats(runs: Iterator[Outputs]) -> Iterator[tuple[int, Rows]]:
    """The float outputs of all runs; a graph may leave their types open."""
    for outputs in runs:
        for place, output in outputs:
            if np.issubdtype(output.dtype, np.floating):
                yield place, output


def _finite(a: Rows, b: Rows) -> tuple[Rows, Rows]:
    """Masked scores are minus infinity in both: equal. What is infinite or NaN in one alone differs."""
    same = np.isfinite(a) | (a == b) | (np.isnan(a) & np.isnan(b))
    wild = ~np.isfinite(a)
    return np.where(wild, 0, a), np.where(wild, np.where(same, 0, np.inf), b)
