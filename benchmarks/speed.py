"""How long quantized models take, relative to a float one: prefill of 256 tokens, decode of one token.

    python benchmarks/speed.py FLOAT.onnx QUANTIZED.onnx [QUANTIZED.onnx ...] [--runs N]

One thread, CPU time. All models are open in one process and take turns, so that a machine that slows down or does other
work does so for all of them; the ratio is the median over rounds of (model / float in the same round). Decoding has
64 tokens in its cache. A graph without a cache has no decode figure. Memory: about twice the size of every model.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.processor import described
from quarot_onnx.sessions import runtime

PREFILL, CACHED = 256, 64

Run = Callable[[], object]


def runs_of(path: Path) -> list[Run | None]:
    """A prefill and a decode step of one model, ready to be run; None where it has no cache."""
    inputs = ModelInputs.from_path(path)
    session = runtime.session(path, threads=1)
    ids = np.random.default_rng(0).integers(0, inputs.vocab_size or 2, (1, PREFILL))
    prompt = inputs.feed(ids)
    if not inputs.has_cache:
        return [lambda: session.run(None, prompt), None]
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, inputs.feed(ids[:, :CACHED])), strict=True))
    step = inputs.feed(ids[:, CACHED : CACHED + 1], inputs.present_to_past(outputs), CACHED)
    return [lambda: session.run(None, prompt), lambda: session.run(None, step)]


def measure(run: Run | None) -> float:
    """CPU milliseconds of one run."""
    if run is None:
        return float("nan")
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of quantized models relative to a float one.")
    parser.add_argument("float_model", type=Path, metavar="FLOAT.onnx")
    parser.add_argument("quantized", type=Path, nargs="+", metavar="QUANTIZED.onnx")
    parser.add_argument("--runs", type=int, default=15, metavar="N", help="rounds, after one to warm up (default: 15)")
    arguments = parser.parse_args()
    paths = [arguments.float_model, *arguments.quantized]
    models = [runs_of(path) for path in paths]
    rounds = [[[measure(run) for run in model] for model in models] for _ in range(arguments.runs + 1)][1:]
    print(described())
    print(f"CPU time in ms, one thread, median of {arguments.runs} alternating rounds")
    print(f"{f'prefill {PREFILL}':>12}{'/ float':>9}{f'decode ({CACHED})':>13}{'/ float':>9}  model")
    for number, path in enumerate(paths):
        line = ""
        for phase, width in ((0, 12), (1, 13)):
            milliseconds = statistics.median(r[number][phase] for r in rounds)
            ratio = statistics.median(r[number][phase] / r[0][phase] for r in rounds)
            line += "-".rjust(width) if math.isnan(milliseconds) else f"{milliseconds:{width}.1f}"
            line += "-".rjust(9) if math.isnan(ratio) else f"{ratio:9.2f}"
        print(f"{line}  {path}")


if __name__ == "__main__":
    main()
