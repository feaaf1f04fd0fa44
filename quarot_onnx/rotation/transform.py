"""Everything that happens to one weight on its way into the output, evaluated once, when it is written.

Steps act on W: [in, out] (a table: [rows, hidden]; a bias: [1, out]), in their order:

* Scale along an axis by a vector, for diag(γ) W;
* Shift by a number, for a γ that is stored as γ - 1;
* Rotate one axis, or the heads within a part of it: W R along axis 1, Rᵀ W along axis 0.

Rounding to the weight's type comes once, at the end (a float16 weight is not rounded between γ and R). float32 weights
are computed in float64; float16 and bfloat16 ones in float32, which has 13 and 16 bits more than they do: against
float64 about one number in a thousand comes out as its neighbour, where the exact one lies in the middle between two.

Blocks of a weight are computed side by side on all cores. How it is cut depends on its shape alone, and so do its bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.errors import ModelError
from quarot_onnx.graph.query import Constant
from quarot_onnx.hadamard.factoring import Floats
from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.io import model_io
from quarot_onnx.io.halves import narrow, widen
from quarot_onnx.io.memory import large_array
from quarot_onnx.threads import Scratch, spread

_BLOCK_ELEMENTS = 1 << 18
"""Numbers in a block: what a step makes of them is still in a processor's cache for the next one."""

_NARROWEST = 128
"""Columns in a block, at least: a row's part of it fills cache lines."""

_SMALL = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))

_scratch = Scratch()

Array = NDArray[Any]
Dtype = np.dtype[np.floating[Any]]
Reader = Callable[[int, int, Array | None], Array]
"""Gives some rows, from the first to the one behind the last; the array takes those of a file, if there is one."""

InPlace = Callable[[Floats], object]
"""A step, ready to overwrite blocks [rows, columns], C-contiguous."""


@dataclass(frozen=True)
class Scale:
    """Multiply along ``axis`` by ``vector`` + ``offset``; ``factor`` multiplies everything."""

    axis: int
    vector: ir.TensorProtocol | None
    offset: float = 0.0
    factor: float = 1.0

    def ready(self, axis: int, dtype: Dtype) -> InPlace:
        """The step along ``axis`` of a block."""
        factors = np.array([self.factor])
        if self.vector is not None:
            factors = (model_io.read_array(self.vector).astype(np.float64).reshape(-1) + self.offset) * self.factor
            if not np.isfinite(factors).all():
                raise _WildError(f"the weight {self.vector.name!r} of a norm")
        factors = (factors[:, None] if axis == 0 else factors).astype(dtype)
        return lambda x: np.multiply(x, factors, out=x)


@dataclass(frozen=True)
class Shift:
    """Add ``by`` to everything."""

    by: float
    axis: int = 1

    def ready(self, axis: int, dtype: Dtype) -> InPlace:  # noqa: ARG002 - as for the other steps
        """The step; it is the same for both axes."""
        by = dtype.type(self.by)
        return lambda x: np.add(x, by, out=x)


@dataclass(frozen=True)
class Rotate:
    """Rotate ``axis`` between ``start`` and ``stop`` in runs of ``rotation.size``."""

    axis: int
    rotation: Rotation
    start: int = 0
    stop: int | None = None

    def ready(self, axis: int, dtype: Dtype) -> InPlace:
        """The step along ``axis`` of a block."""
        n, mix = self.rotation.size, self.rotation.mixer(dtype)

        def rotate(x: Floats) -> None:
            if axis == 0:
                mix(x[self.start : self.stop].reshape(-1, n, x.shape[1]))
                return
            part = x[:, self.start : self.stop]
            if part.flags.c_contiguous:
                mix(part.reshape(-1, n, 1))
                return
            whole = _scratch.array("part", part.shape, x.dtype)
            np.copyto(whole, part)
            mix(whole.reshape(-1, n, 1))
            np.copyto(part, whole)

        return rotate


Step = Scale | Shift | Rotate


@dataclass(frozen=True, eq=False)
class WeightTransform:
    """A constant, the steps to take with it, and how to store the result.

    Attributes:
        source: The constant, seen as [in, out], or a vector.
        steps: What happens to it.
        stored_transposed: Write the transpose (a Gemm with transB keeps its layout).
    """

    source: Constant
    steps: tuple[Step, ...]
    stored_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as it is written."""
        return self.source.shape[::-1] if self.stored_transposed else self.source.shape

    def tensor(self, name: str, reader: str = "") -> ir.TensorProtocol:
        """The result as a tensor that is computed whenever it is read; the node that reads it is for messages."""
        return model_io.lazy_tensor(
            partial(self.evaluate, reader), dtype=self.source.dtype, shape=self.shape, name=name
        )

    def same_as(self, other: "WeightTransform") -> bool:
        """Whether both make the same tensor, so that one initializer can serve both uses."""
        return (self.source.value, self.source.dtype, self.shape, self.stored_transposed, self.steps) == (
            (other.source.value, other.source.dtype, other.shape, other.stored_transposed, other.steps)
        )

    def evaluate(self, reader: str = "") -> Array:
        """Compute the result.

        Args:
            reader: The node that reads it, for the message.

        Raises:
            ModelError: The source, or a vector that scales it, holds NaN or infinity, which would spread.
        """
        try:
            return self._evaluate()
        except _WildError as error:
            of = f" of {reader!r}" if reader else ""
            what = str(error) or f"the weight {self.source.value.name!r}{of}"
            raise ModelError(
                f"{what} holds NaN or infinity, and nothing can be made of it, rotated or quantized; export the model "
                "again"
            ) from None

    def _evaluate(self) -> Array:
        """The result, first block by block of rows, then of columns, where there are steps along both axes.

        Steps on the two axes commute. Between them the weight as a whole is in the precision of the arithmetic.
        """
        result = large_array(self.shape, self.source.dtype.numpy())
        target = result.reshape(-1, result.shape[-1])
        # Rows and columns, here, are those of the source as it is stored.
        if self.stored_transposed != self.source.transposed:
            target = target.T
        turned = int(self.source.transposed)
        dtype: Dtype = np.dtype(np.float32 if result.dtype in _SMALL else np.float64)
        within_rows, within_columns = (
            [step.ready(axis, dtype) for step in self.steps if step.axis ^ turned == axis] for axis in (1, 0)
        )
        read = self._reader()
        rows, columns = target.shape
        row_spans = _spans(rows, max(1, _BLOCK_ELEMENTS // max(1, columns)))
        first = large_array(target.shape, dtype) if within_rows and within_columns else target

        def across(span: tuple[int, int]) -> None:
            into = _scratch.array("rows", (span[1] - span[0], columns), self.source.tensor.dtype.numpy())
            _take(within_rows, read(*span, into), first[slice(*span)], dtype)

        if within_rows or not within_columns:
            spread(across, row_spans)
        if within_columns:
            source = first if within_rows else self._whole(read, row_spans)
            spans = _spans(columns, max(_NARROWEST, _BLOCK_ELEMENTS // max(1, rows)))
            spread(lambda span: _take(within_columns, source[:, slice(*span)], target[:, slice(*span)], dtype), spans)
        return result

    def _whole(self, read: Reader, spans: list[tuple[int, int]]) -> Array:
        """All rows of the source; from a file they are read on all cores."""
        if not self._is_in_file():
            return read(0, spans[-1][1], None)
        whole = large_array((spans[-1][1], self.source.tensor.shape.numpy()[-1]), self.source.tensor.dtype.numpy())

        spread(lambda span: read(*span, whole[slice(*span)]), spans)
        return whole

    def _reader(self) -> Reader:
        """What gives rows of the source as it is stored; from a file only those, into the array that is given."""
        tensor = self.source.tensor
        if self._is_in_file():
            return lambda start, stop, into: model_io.read_rows(tensor, start, stop, into)
        stored: Array = model_io.read_array(tensor, own=False)
        matrix = stored.reshape(-1, stored.shape[-1])
        return lambda start, stop, _: matrix[start:stop]

    def _is_in_file(self) -> bool:
        """Whether rows can be read from a file."""
        tensor = self.source.tensor
        return isinstance(tensor, ir.ExternalTensor) and len(self.source.shape) == 2 and tensor.dtype.bitwidth >= 8


class _WildError(Exception):
    """A block holds NaN or infinity, or what it is scaled by, which is named."""


def _take(steps: list[InPlace], source: Array, target: Array, dtype: Dtype) -> None:
    """Take steps with a block [rows, columns] and put it where it belongs, rounded to the target's type.

    A target that can hold the block meanwhile does.
    """
    held = target.dtype == dtype and target.flags.c_contiguous
    x: Array = target if held else _scratch.array("block", target.shape, dtype)
    if source.dtype == np.float16 and dtype == np.float32:
        widen(source, x)
    else:
        np.copyto(x, source)
    if not (np.isfinite(np.vdot(x, x)) or np.isfinite(x).all()):  # the first takes the least time
        raise _WildError
    for step in steps:
        step(x)
    if target.dtype == np.float16:
        narrow(x, target)
    elif not held:
        np.copyto(target, x, casting="unsafe")  # ml_dtypes names no kind of its types


def _spans(length: int, step: int) -> list[tuple[int, int]]:
    """``length`` rows or columns in blocks of ``step``."""
    return [(start, min(start + step, length)) for start in range(0, length, step)]
