"""What rounding to nearest costs: nanoseconds of processor time a weight, in one thread, with and without the search.

    python benchmarks/rounding.py [--bits 4] [--group 128 --group 32] [--rows 256] [--columns 4096] [--runs 40]

Gaussian weights in float16, as a rotation makes them. Of all runs the shortest and the median: on a machine with other
work the shortest is nearest to what a free one takes.
"""

import argparse
import os
import statistics
import time

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.rounding.rtn import round_to_nearest_weight


def main() -> None:
    parser = argparse.ArgumentParser(description="What rounding to nearest costs.")
    parser.add_argument("--bits", type=int, default=4, help="default: 4")
    parser.add_argument("--group", type=int, action="append", help="weights that share a scale (default: 128, 32)")
    parser.add_argument("--rows", type=int, default=256, help="inputs (default: 256)")
    parser.add_argument("--columns", type=int, default=4096, help="outputs (default: 4096)")
    parser.add_argument("--runs", type=int, default=40, metavar="N", help="default: 40")
    arguments = parser.parse_args()
    weight = (np.random.default_rng(0).standard_normal((arguments.rows, arguments.columns)) / 64).astype(np.float16)
    print(f"{'ns a weight, shortest (median)':34}{'plain':>16}{'with the search':>18}")
    for group in arguments.group or (128, 32):
        for symmetric in (True, False):
            scheme, cells = WeightScheme(arguments.bits, symmetric=symmetric, group_size=group), []
            for clip in (False, True):
                spent = []
                for _ in range(arguments.runs):
                    start = time.thread_time()
                    round_to_nearest_weight(weight, scheme, "weight", clip=clip)
                    spent.append((time.thread_time() - start) / weight.size * 1e9)
                cells.append(f"{min(spent):.1f} ({statistics.median(spent):.1f})")
            name = f"groups of {group}, {'symmetric' if symmetric else 'asymmetric'}"
            print(f"{name:34}{cells[0]:>16}{cells[1]:>18}", flush=True)


if __name__ == "__main__":
    main()
