"""Everything that happens to one weight on its way into the output, evaluated once, when it is written.

Steps act on W: [in, out] (a table: [rows, hidden]; a bias: [1, out]) in float64, in their order:

* Scale along an axis by a vector, for diag(γ) W;
* Shift by a number, for a γ that is stored as γ - 1;
* Rotate one axis, or the heads within a part of it: W R along axis 1, Rᵀ W along axis 0.

Rounding to the weight's type comes once, at the end (a float16 weight is not rounded between γ and R).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.graph.query import Constant
from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.io import model_io

_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Scale:
    """Multiply along ``axis`` by ``vector`` + ``offset``; ``factor`` multiplies everything."""

    axis: int
    vector: ir.TensorProtocol | None
    offset: float = 0.0
    factor: float = 1.0

    def apply(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The scaled array; ``x`` may be changed in place."""
        if self.vector is not None:
            v = model_io.read_array(self.vector).astype(np.float64).reshape(-1) + self.offset
            x *= v[:, None] if self.axis == 0 else v
        x *= self.factor
        return x


@dataclass(frozen=True)
class Shift:
    """Add ``by`` to everything."""

    by: float
    axis: int = 1

    def apply(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The shifted array; ``x`` may be changed in place."""
        x += self.by
        return x


@dataclass(frozen=True)
class Rotate:
    """Rotate ``axis`` between ``start`` and ``stop`` in runs of ``rotation.size``."""

    axis: int
    rotation: Rotation
    start: int = 0
    stop: int | None = None

    def apply(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The rotated array; ``x`` may be changed in place."""
        n = self.rotation.size
        stop = x.shape[self.axis] if self.stop is None else self.stop
        if (self.start, stop, n) == (0, x.shape[self.axis], x.shape[self.axis]):
            return self.rotation.apply(x, self.axis)
        part = x[self.start : stop] if self.axis == 0 else x[:, self.start : stop]
        rows, columns = part.shape
        if self.axis == 0:
            part[...] = self.rotation.apply(part.reshape(-1, n, columns), 1).reshape(rows, columns)
        else:
            part[...] = self.rotation.apply(part.reshape(rows, -1, n), 2).reshape(rows, columns)
        return x


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

    def tensor(self, name: str) -> ir.TensorProtocol:
        """The result as a tensor that is computed whenever it is read."""
        return model_io.lazy_tensor(self.evaluate, dtype=self.source.dtype, shape=self.shape, name=name)

    def same_as(self, other: "WeightTransform") -> bool:
        """Whether both make the same tensor, so that one initializer can serve both uses."""
        return (self.source.value, self.source.dtype, self.shape, self.stored_transposed, self.steps) == (
            (other.source.value, other.source.dtype, other.shape, other.stored_transposed, other.steps)
        )

    def evaluate(self) -> NDArray[np.generic]:
        """Compute the result in blocks, each across the axis that its steps leave alone.

        Steps on the two axes commute. Where there are both, the weight as a whole is in float64 between them.
        """
        on_rows = tuple(step for step in self.steps if step.axis == 0)
        on_columns = tuple(step for step in self.steps if step.axis == 1)
        result = np.empty(self.shape, dtype=self.source.dtype.numpy())
        seen = result.T if self.stored_transposed else result
        seen = seen.reshape(-1, seen.shape[-1]) if seen.ndim != 2 else seen
        rows, columns = seen.shape
        if not on_rows and not self.source.transposed and len(self.source.shape) == 2:
            for start, stop in _spans(rows, columns):
                part = model_io.read_rows(self.source.tensor, start, stop)
                seen[start:stop] = _run(on_columns, part.astype(np.float64))
            return result
        between = self._whole()
        if on_rows and on_columns:
            between = between.astype(np.float64)
        target = between if on_rows and on_columns else seen
        if on_columns or not on_rows:
            for start, stop in _spans(rows, columns):
                target[start:stop] = _run(on_columns, between[start:stop].astype(np.float64))
        if on_rows:
            for start, stop in _spans(columns, rows):
                seen[:, start:stop] = _run(on_rows, between[:, start:stop].astype(np.float64))
        return result

    def _whole(self) -> NDArray[np.generic]:
        """The source, seen as a matrix."""
        stored: NDArray[np.generic] = model_io.read_array(self.source.tensor)
        if stored.ndim != 2:
            stored = stored.reshape(-1, stored.shape[-1])
        return stored.T if self.source.transposed else stored


def _run(steps: tuple[Step, ...], x: NDArray[np.float64]) -> NDArray[np.float64]:
    for step in steps:
        x = step.apply(x)
    return x


def _spans(length: int, width: int) -> Iterator[tuple[int, int]]:
    """Cut ``length`` rows of ``width`` float64 numbers into blocks of about 32 MiB."""
    step = max(1, _BLOCK_BYTES // (8 * max(1, width)))
    for start in range(0, length, step):
        yield start, min(start + step, length)
