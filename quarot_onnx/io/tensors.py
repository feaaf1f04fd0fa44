"""Tensors that are computed when needed, and reading without keeping.

onnx-ir maps an external tensor into memory and keeps the pages until ``release``, and believes whatever a
``LazyTensor`` says about its shape. Here reading copies from the file, and a lazy tensor that lies is stopped before it
shifts every tensor behind it.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from quarot_onnx.errors import ModelError
from quarot_onnx.io.memory import large_array, reused
from quarot_onnx.threads import one_blas_thread

Array = npt.NDArray[Any]

_UNPACKED = {ir.DataType.INT4: np.dtype(np.int8), ir.DataType.UINT4: np.dtype(np.uint8)}


def lazy_tensor(
    compute: Callable[[], Array], *, dtype: ir.DataType, shape: Sequence[int], name: str
) -> ir.TensorProtocol:
    """A tensor computed each time it is read or written, never kept.

    Args:
        compute: Gives the array in ``shape`` and in the NumPy type of ``dtype`` (``ml_dtypes`` for bfloat16 and 4
            bits). For INT4 and UINT4 also int8 and uint8, one element each, within range.
        dtype: The ONNX type.
        shape: The shape.
        name: The tensor's name, for messages.

    Returns:
        The tensor. Evaluating it raises AssertionError if the array has another type or shape.
    """
    expected, dims = dtype.numpy(), tuple(shape)

    def evaluate() -> ir.TensorProtocol:
        array = compute()
        assert array.shape == dims, f"lazy tensor {name!r} has shape {array.shape}, declared {dims}"
        if dtype in _UNPACKED and array.dtype == _UNPACKED[dtype]:
            limits = ml_dtypes.iinfo(expected)  # type: ignore[no-untyped-call]
            inside = array.size == 0 or (array.min() >= int(limits.min) and array.max() <= int(limits.max))
            assert inside, f"lazy tensor {name!r} has values beyond {dtype.name}"
            array = array.astype(expected)
        assert array.dtype == expected, f"lazy tensor {name!r} has type {array.dtype}, declared {dtype.name}"
        return ir.Tensor(array, dtype=dtype, name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(dims), name=name)


def computed_ahead(tensors: Iterable[ir.TensorProtocol]) -> Generator[ir.TensorProtocol]:
    """The tensors in their order, lazy ones computed: each while the caller is busy with the one before it.

    So two of them are in memory at a time. BLAS keeps to one thread meanwhile, as what computes spreads itself.
    """
    with ThreadPoolExecutor(1) as worker, one_blas_thread(), reused():
        coming: Future[ir.TensorProtocol] | None = None
        for tensor in tensors:
            ready, coming = coming, worker.submit(copy_context().run, _computed, tensor)
            if ready is not None:
                yield ready.result()
            del ready
        if coming is not None:
            yield coming.result()


def _computed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if not isinstance(tensor, ir.LazyTensor):
        return tensor
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def read_array(tensor: ir.TensorProtocol, *, own: bool = True) -> Array:
    """A tensor's value as an array of its own: writable, and holding no file open.

    An external tensor is read from its file, not mapped, so the array is all the memory that it takes. 4-bit tensors
    come unpacked, one ``ml_dtypes`` element per byte.

    Args:
        tensor: The tensor.
        own: False where nothing is written into the array: what a lazy tensor computes need not be copied then.

    Raises:
        ModelError: If the data file no longer holds the tensor.
    """
    dims = tuple(tensor.shape.numpy())
    if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.bitwidth >= 8:
        return _read_elements(tensor, 0, dims)
    if isinstance(tensor, ir.LazyTensor) and not own:
        return tensor.numpy()
    array = np.array(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array


def read_rows(tensor: ir.TensorProtocol, start: int, stop: int, into: Array | None = None) -> Array:
    """``read_array(tensor)[start:stop]``, reading only those rows of an external tensor.

    Args:
        tensor: The tensor.
        start: The first row.
        stop: The one behind the last.
        into: A contiguous array of the result's shape and type that may be overwritten, and returned.

    Raises:
        ModelError: If the data file no longer holds the tensor.
    """
    dims = tuple(tensor.shape.numpy())
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth < 8:
        return read_array(tensor)[start:stop].copy()
    start, stop, _ = slice(start, stop).indices(dims[0])
    row = int(np.prod(dims[1:], dtype=np.int64))
    dims = (max(stop - start, 0), *dims[1:])
    return _read_elements(tensor, start * row, dims, into)


def _read_elements(tensor: ir.ExternalTensor, first: int, dims: tuple[int, ...], into: Array | None = None) -> Array:
    """An array of ``dims`` from the tensor's file, from element ``first`` on."""
    array = large_array(dims, tensor.dtype.numpy()) if into is None else into
    assert (array.shape, array.dtype, array.flags.c_contiguous) == (dims, tensor.dtype.numpy(), True)
    offset = (tensor.offset or 0) + first * array.itemsize
    with open(tensor.path, "rb", buffering=0) as file:  # noqa: PTH123 - onnx-ir gives a string
        file.seek(offset)
        view, filled = array.reshape(-1).view(np.uint8).data, 0
        while filled < array.nbytes and (count := file.readinto(view[filled:])):
            filled += count
    if filled < array.nbytes:
        raise ModelError(
            f"data file {tensor.path} shrank since the model was opened: tensor {tensor.name!r} needs "
            f"{array.nbytes:,} bytes at {offset:,}; open the model again"
        )
    return array
