"""How long onnxruntime's quantized products take, relative to its float MatMul, in the sizes of a model's Linears.

    python benchmarks/kernels.py MODEL.onnx [--rows 1 16 256] [--rounds N]

Says what a format can gain at most on this processor, before anything is quantized: `uint8` is the product of 8-bit
weights beside 8-bit activations (`w8a8-*`, `w8`), `int8` that of fewer bits (`w4a8`, `--w-bits 7`) and of 8 bits with
`--weight-type int8`, the others are those of `nbits`. One thread, CPU time; kernels take turns in one process, and the
ratio is the median over rounds. Every size runs on many different weights, 100 MB as float, since a model's weights
come from memory and not from the cache. The weights are random.
"""

import argparse
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from quarot_onnx.graph.linear import linears
from quarot_onnx.io import model_io
from quarot_onnx.processor import described

FLOAT_BYTES = 100_000_000
"""Weights of one size, as float32."""

MOST = 200
"""Products of one size."""

WARM_UP = 2

Arrays = dict[str, np.ndarray]
Kernel = Callable[[int, int, np.random.Generator, str], tuple[NodeProto, Arrays]]
"""Inputs, outputs, randomness, name -> a node that reads `x` and `q`, and its constants."""


def float_product(k: int, n: int, rng: np.random.Generator, name: str) -> tuple[NodeProto, Arrays]:
    """MatMul."""
    weight = f"{name}/w"
    node = helper.make_node("MatMul", ["x", weight], [name])
    return node, {weight: rng.standard_normal((k, n), dtype=np.float32)}


def integer_product(middle: int) -> Kernel:
    """MatMulIntegerToFloat, a scale for each output; weights are int8, or uint8 around 128."""

    def made(k: int, n: int, rng: np.random.Generator, name: str) -> tuple[NodeProto, Arrays]:
        weight, scale, zero = f"{name}/w", f"{name}/s", f"{name}/z"
        kind = np.uint8 if middle else np.int8
        inputs = ["q", weight, "activation_scale", scale, "activation_zero", zero]
        node = helper.make_node("MatMulIntegerToFloat", inputs, [name], domain="com.microsoft")
        return node, {
            weight: rng.integers(middle - 127, middle + 128, (k, n), dtype=kind),
            scale: rng.random(n, dtype=np.float32),
            zero: np.full(n, middle, kind),
        }

    return made


def blocked_product(bits: int, block: int, level: int) -> Kernel:
    """MatMulNBits."""

    def made(k: int, n: int, rng: np.random.Generator, name: str) -> tuple[NodeProto, Arrays]:
        weight, scale, blocks = f"{name}/w", f"{name}/s", math.ceil(k / block)
        attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": level}
        node = helper.make_node("MatMulNBits", ["x", weight, scale], [name], domain="com.microsoft", **attributes)
        return node, {
            weight: rng.integers(0, 256, (n, blocks, block * bits // 8), dtype=np.uint8),
            scale: rng.random((n, blocks), dtype=np.float32),
        }

    return made


KERNELS: dict[str, Kernel] = {
    "float": float_product,
    "uint8": integer_product(128),
    "int8": integer_product(0),
    "4 bits, level 4": blocked_product(4, 128, 4),
    "4 bits, float": blocked_product(4, 128, 0),
    "8 bits, level 4": blocked_product(8, 128, 4),
}


def session(kernel: Kernel, k: int, n: int, rng: np.random.Generator) -> tuple[Any, int]:
    """A session that computes many independent products of one size, and their number."""
    import onnxruntime  # noqa: PLC0415 - as in the package

    count = min(MOST, max(1, FLOAT_BYTES // (4 * k * n)))
    made = [kernel(k, n, rng, f"y{place}") for place in range(count)]
    constants: Arrays = {"activation_scale": np.array(1 / 127, np.float32), "activation_zero": np.array(128, np.uint8)}
    nodes = [helper.make_node("QuantizeLinear", ["x", "activation_scale", "activation_zero"], ["q"])]
    for node, arrays in made:
        nodes.append(node)
        constants |= arrays
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, k])],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, [None, n]) for node, _ in made],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]), count


def sizes(path: Path) -> Counter[tuple[int, int]]:
    """How often each (inputs, outputs) occurs among a model's Linears."""
    return Counter((linear.in_features, linear.out_features) for linear in linears(model_io.load(path).graph))


def measure(k: int, n: int, rows: list[int], rounds: int) -> dict[int, dict[str, float]]:
    """CPU microseconds of one product by number of rows and kernel."""
    rng = np.random.default_rng(0)
    sessions = {name: session(kernel, k, n, rng) for name, kernel in KERNELS.items()}
    found: dict[int, dict[str, float]] = {}
    for m in rows:
        x = rng.uniform(-1, 1, (m, k)).astype(np.float32)
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(WARM_UP + rounds):
            for name, (running, count) in sessions.items():
                start = time.process_time()
                running.run(None, {"x": x})
                times[name].append(1e6 * (time.process_time() - start) / count)
        found[m] = {name: statistics.median(values[WARM_UP:]) for name, values in times.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of onnxruntime's quantized products relative to float.")
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256], metavar="M", help="default: 1 16 256")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="rounds, after two to warm up (default: 9)")
    arguments = parser.parse_args()
    print(described())
    print(f"CPU time of one product, one thread, median of {arguments.rounds} alternating rounds, relative to float")
    print(f"{'inputs':>7}{'outputs':>9}{'times':>7}{'rows':>6}{'float, us':>11}", end="")
    print("".join(f"{name:>17}" for name in KERNELS if name != "float"))
    for (k, n), often in sorted(sizes(arguments.model).items()):
        for m, found in measure(k, n, arguments.rows, arguments.rounds).items():
            ratios = "".join(f"{found[name] / found['float']:17.2f}" for name in KERNELS if name != "float")
            print(f"{k:7}{n:9}{often:7}{m:6}{found['float']:11.1f}{ratios}", flush=True)


if __name__ == "__main__":
    main()
