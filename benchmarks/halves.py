"""What float16 costs: nanoseconds a number on one thread, by NumPy and as the package converts.

    python benchmarks/halves.py [--runs N] [--size N ...]

Numbers are those of a weight; the shortest of the runs counts. Results are compared bit for bit.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from quarot_onnx.io.halves import narrow, widen


def nanoseconds(work: Callable[[], object], numbers: int, runs: int) -> float:
    times = []
    for _ in range(runs + 1):  # the first one opens the session
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:]) / numbers * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="float16 to float32 and back, by NumPy and as the package does it.")
    parser.add_argument("--runs", type=int, default=50, metavar="N")
    parser.add_argument("--size", type=int, nargs="+", default=[1 << 16, 1 << 18, 1 << 20], metavar="N")
    arguments = parser.parse_args()
    print(f"{'numbers':>9}{'to float32: NumPy':>20}{'here':>8}{'to float16: NumPy':>20}{'here':>8}")
    for size in arguments.size:
        wide = 0.02 * np.random.default_rng(0).standard_normal((size // 512, 512), np.float32)
        half, expected = np.empty(wide.shape, np.float16), wide.astype(np.float16)
        again = np.empty_like(wide)
        costs = [
            nanoseconds(work, wide.size, arguments.runs)
            for work in (
                lambda again=again, expected=expected: np.copyto(again, expected),
                lambda again=again, expected=expected: widen(expected, again),
                lambda half=half, wide=wide: np.copyto(half, wide, casting="same_kind"),
                lambda half=half, wide=wide: narrow(wide, half),
            )
        ]
        assert (half.view(np.int16) == expected.view(np.int16)).all()
        assert (again == expected).all()
        print(f"{size:9,}{costs[0]:20.2f}{costs[1]:8.2f}{costs[2]:20.2f}{costs[3]:8.2f}", flush=True)


if __name__ == "__main__":
    main()
