"""Perplexity by position, of several models, as ratios to the first: does what was calibrated hold further on?

    python benchmarks/position_perplexity.py FLOAT.onnx OTHER.onnx ... TEXT [--length 4096] [--windows 2]

Windows of ``--length`` tokens are run at once, and the negative log likelihood of their tokens is taken apart by
position. A cache that is quantized is read quantized in a prefill, too.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.calibration.text import choose_bos, load_tokenizer, read_text, tokenizer_file, windows
from quarot_onnx.evaluation.logits import negative_log_likelihood
from quarot_onnx.evaluation.scored import Scored
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.piecewise.runs import opened

_WAY_OUT = "name models that take token ids"


def losses(path: Path, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of every token but the first, in nats, [windows, length - 1]."""
    model = Scored.of_text(path)
    every = model.logits_of(opened(path, Memory(), low_memory=True), (row[None] for row in ids), _WAY_OUT)
    return np.stack(
        [negative_log_likelihood(logits[-len(row) : -1], row[1:]) for (logits,), row in zip(every, ids, strict=True)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("text", type=Path)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=2)
    options = parser.parse_args()
    source = tokenizer_file(options.models[0].parent)
    tokenizer, bos = load_tokenizer(source), choose_bos(source).id
    cut = windows(read_text(options.text), tokenizer, length=options.length, count=options.windows, bos_id=bos)
    edges = [edge for edge in (0, 512, *range(1024, options.length, 1024)) if edge < options.length]
    parts = list(itertools.pairwise([*edges, options.length]))
    print(f"{'':40}", *(f"{start}-{stop}".rjust(10) for start, stop in parts), "all".rjust(10))
    first: NDArray[np.float64] | None = None
    for path in options.models:
        own = losses(path, cut)
        means = np.array([own[:, start:stop].mean() for start, stop in parts] + [own.mean()])
        shown = np.exp(means if first is None else means - first)
        first = means if first is None else first
        print(f"{str(path)[-40:]:40}", *(f"{value:10.4f}" for value in shown), flush=True)


if __name__ == "__main__":
    main()
