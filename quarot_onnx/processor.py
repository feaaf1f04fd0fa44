"""What this processor makes of products of 8-bit integers.

On x86 without VNNI onnxruntime multiplies uint8 activations and int8 weights with an instruction that adds two products
in 16 bits, and saturates: 255 · 127 · 2 = 64,770 becomes 32,767. Weights of up to 64 in size are safe (255 · 64 · 2 =
32,640), and so is uint8 × uint8, which takes another instruction. onnxruntime is asked, not the processor's name.
"""

import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

LARGEST_SAFE = 64
"""The largest int8 weight, in size, whose products with uint8 activations saturate nowhere."""

EXACT_PRODUCTS = "session.x64quantprecision"
"""onnxruntime's session option that, set to 1, computes such products exactly, as uint8 × uint8."""

_TERMS = 64


@cache
def saturates() -> bool:
    """Whether products of uint8 activations and int8 weights saturate here: a sum of 255 · 127, as onnxruntime has it.

    Takes some milliseconds once onnxruntime is imported, the first time.
    """
    import numpy as np  # noqa: PLC0415 - as below
    import onnxruntime as ort  # noqa: PLC0415 - a quarter of a second that most commands can do without

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(_probe(), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.full((1, _TERMS), 255, np.uint8)})
    return bool((np.asarray(result) != 255 * 127 * _TERMS).any())


def _probe() -> bytes:
    """One MatMulInteger."""
    import numpy as np  # noqa: PLC0415 - what prints results imports this module, and nothing heavy
    import onnx_ir as ir  # noqa: PLC0415

    weight = ir.Value(name="w", const_value=ir.Tensor(np.full((_TERMS, 16), 127, np.int8), name="w"))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape((1, _TERMS)))
    node = ir.node("MatMulInteger", [x, weight])
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.INT32), ir.Shape((1, 16))
    graph = ir.Graph([x], [y], nodes=[node], initializers=[weight], opset_imports={"": 13}, name="probe")
    content: bytes = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()
    return content


def described() -> str:
    """The processor as the operating system names it, and what it makes of 8-bit products."""
    products = "uint8 x int8 products saturate (no VNNI)" if saturates() else "exact 8-bit products"
    return f"{_name()}, {products}"


def _name() -> str:
    """The processor's name, for people; nothing depends on it."""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    if sys.platform == "darwin":
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        told = subprocess.run(asked, capture_output=True, text=True, check=False)  # noqa: S603 - fixed words
        return told.stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()
