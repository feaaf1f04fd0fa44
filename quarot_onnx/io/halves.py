"""float16 to float32 and back: NumPy's results, by onnxruntime's Cast, on a processor's own instructions.

NumPy converts float16 number by number. onnxruntime's kernels convert sixteen at a time where the processor can, and
round as NumPy does: to nearest, ties to even, subnormal numbers kept, beyond the range to infinity. On a processor with
AVX512 all 2³² numbers came out with NumPy's bits, but for NaN: NaN it stays, which one is the processor's affair.

A session of one Cast serves all threads: it has no threads of its own, and works on the arrays themselves. Arrays that
are not contiguous go through a small one that is, which stays in the cache.
"""

from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.threads import Scratch

if TYPE_CHECKING:
    import onnxruntime as ort

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
"""The floats of 16 bits, which onnxruntime computes with as 32-bit ones on a CPU."""

_SLICE = 1 << 17
"""Elements at a time that go through a small array."""

_OPSET, _IR_VERSION = 13, 8
"""Of the graph of a Cast: older than any onnxruntime that is supported."""

_FATAL = 4

_scratch = Scratch()
_opening = Lock()


def widen(halves: NDArray[np.float16], out: NDArray[np.float32]) -> None:
    """Write float16 numbers into a float32 array, exactly.

    Args:
        halves: [rows, columns], in any layout.
        out: The same shape, C-contiguous.
    """
    if halves.flags.c_contiguous:
        _cast(halves, out)
        return
    for part in _slices(out.shape):
        held = _scratch.array("halves", out[part].shape, np.float16)
        np.copyto(held, halves[part])
        _cast(held, out[part])


def narrow(x: NDArray[np.float32], out: NDArray[np.float16]) -> None:
    """Round float32 numbers to float16: to nearest, ties to even, to infinity beyond the range.

    Args:
        x: [rows, columns], C-contiguous.
        out: The same shape, in any layout.
    """
    if out.flags.c_contiguous:
        _cast(x, out)
        return
    for part in _slices(x.shape):
        held = _scratch.array("halves", x[part].shape, np.float16)
        _cast(x[part], held)
        np.copyto(out[part], held)


def _slices(shape: tuple[int, ...]) -> list[slice]:
    """Rows that are converted together."""
    rows, columns = shape
    step = max(1, _SLICE // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _cast(source: NDArray[Any], target: NDArray[Any]) -> None:
    """Convert numbers, from one contiguous array into another one of the same shape."""
    if not source.size:
        return
    with _opening:
        session = _session(source.dtype, target.dtype)
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, source.dtype.type, [source.size], source.ctypes.data)
    binding.bind_output("y", "cpu", 0, target.dtype.type, [target.size], target.ctypes.data)
    session.run_with_iobinding(binding)


@cache
def _session(source: "np.dtype[Any]", target: "np.dtype[Any]") -> "ort.InferenceSession":
    """A graph of one Cast, in the thread that calls it."""
    import onnxruntime as ort  # noqa: PLC0415 - a tenth of a second that most commands can do without

    kinds = [onnx.helper.np_dtype_to_tensor_dtype(kind) for kind in (source, target)]
    ends = [onnx.helper.make_tensor_value_info(name, kind, ["n"]) for name, kind in zip("xy", kinds, strict=True)]
    node = onnx.helper.make_node("Cast", ["x"], ["y"], to=kinds[1])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "cast", ends[:1], ends[1:]),
        opset_imports=[onnx.helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
