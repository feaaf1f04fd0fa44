"""What R4 costs when the model runs: the ways to cut its Hadamard into factors, and block-diagonal ones.

    python benchmarks/online_rotation.py [--size 11008 ...] [--rows 1 256] [--rounds 15] [--all]

Every way is a graph as it is written into models, in a session of one thread; ways take turns, and figures are medians
of CPU time over rounds, relative to the way that is chosen. Ways with a factor wider than 256 are left out, and so are
all but the nine cheapest by the rule of `hadamard/factoring.py` unless `--all` asks for them.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from quarot_onnx.graph.edit import Editor
from quarot_onnx.hadamard.factoring import all_splits
from quarot_onnx.hadamard.online import OnlineFactors, scaled_factors
from quarot_onnx.hadamard.orders import construct
from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.processor import described
from quarot_onnx.rotation.online import OnlineWriter

SIZES = (1536, 4096, 5632, 11008, 14336, 18944)
"""Inputs of down projections: SmolLM2, TinyLlama's hidden size doubled, TinyLlama, Llama-2-7B, Llama-3-8B, Qwen2-7B."""

BLOCKS = (64, 128)
WIDEST, SHOWN, WARM_UP = 256, 9, 3


def session(size: int, factors: OnlineFactors) -> Any:
    """The rotation of x: [1, rows, size]."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "rows", size]))
    model = ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 18}, name="rotation"), ir_version=10)
    nodes = OnlineWriter(Editor(model)).build(x, factors, ir.DataType.FLOAT, "R4")
    model.graph.extend(nodes)
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), x.shape
    model.graph.outputs.append(y)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def ways(size: int, *, every: bool) -> dict[str, OnlineFactors]:
    """Each way by its name, the chosen one first."""
    chosen = Rotation.hadamard(size).online()
    found = {name(chosen): chosen}
    construction = construct(size)
    assert construction is not None, size
    splits = [item for item in all_splits(construction).items() if max(item[0]) <= WIDEST]
    splits.sort(key=lambda item: sum(item[0]) + 32 * len(item[0]))
    for _, hadamards in splits if every else splits[:SHOWN]:
        factors = scaled_factors(size, hadamards)
        found.setdefault(name(factors), factors)
    for block in BLOCKS:
        if size % block == 0:
            found[f"blocks of {block}"] = Rotation.hadamard(size, block_size=block).online()
    return found


def name(factors: OnlineFactors) -> str:
    return "·".join(str(len(factor)) for factor in factors.factors)


def times(sessions: dict[str, Any], x: np.ndarray, rounds: int) -> dict[str, float]:
    """Median seconds of CPU time of each."""
    repeats = max(1, 200_000 // x.size)
    found: dict[str, list[float]] = {way: [] for way in sessions}
    for number in range(rounds + WARM_UP):
        for way, opened in sessions.items():
            start = time.process_time()
            for _ in range(repeats):
                opened.run(None, {"x": x})
            if number >= WARM_UP:
                found[way].append((time.process_time() - start) / repeats)
    return {way: statistics.median(seconds) for way, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="What R4 costs when the model runs.")
    parser.add_argument("--size", type=int, nargs="+", default=SIZES, metavar="N", help="lengths of the rotated axis")
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 256), metavar="M", help="tokens (default: 1 256)")
    parser.add_argument("--rounds", type=int, default=15, metavar="R", help="rounds that are timed (default: 15)")
    parser.add_argument("--all", action="store_true", help="show all ways")
    arguments = parser.parse_args()
    print(described())
    for size in arguments.size:
        sessions = {way: session(size, factors) for way, factors in ways(size, every=arguments.all).items()}
        x = {rows: np.random.default_rng(0).standard_normal((1, rows, size), np.float32) for rows in arguments.rows}
        found = {rows: times(sessions, x[rows], arguments.rounds) for rows in arguments.rows}
        print(f"\n{size:24}" + "".join(f"{rows:>6} rows, ms{'relative':>10}" for rows in arguments.rows))
        chosen = next(iter(sessions))
        for way in sessions:
            cells = (f"{1e3 * f[way]:14.3f}{f[way] / f[chosen]:10.2f}" for f in found.values())
            print(f"{way:24}{''.join(cells)}{'  chosen' if way == chosen else ''}", flush=True)


if __name__ == "__main__":
    main()
