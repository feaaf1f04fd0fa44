"""How long models take to open, and what onnxruntime's own optimised copy of the graph saves of it.

    python benchmarks/load_time.py MODEL.onnx [MODEL.onnx ...] [--runs 5] [--keep FOLDER]

onnxruntime writes the graph as it has rewritten it for this machine, its weights already packed for the processor's
kernels, into one data file (``session.save_external_prepacked_constant_initializers``); opened again without
optimization, it maps that file and packs nothing. Ways take turns, each opening in a process of its own: seconds are
the median, the peak is of the resident set. Such a copy belongs to this processor and this onnxruntime.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from quarot_onnx.sessions.runtime import write_optimized

PROBE = """
import json, sys, time
import onnxruntime as ort
path, optimised, packed = sys.argv[1], sys.argv[2] == "1", sys.argv[3] == "1"
options = ort.SessionOptions()
options.log_severity_level = 3
options.intra_op_num_threads = 1
if optimised:
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
if not packed:
    options.add_session_config_entry("session.disable_prepacking", "1")
start = time.perf_counter()
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
seconds = time.perf_counter() - start
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([seconds, int(peak.split()[1]) * 1024 / 1e6]))
"""


def opened(path: Path, *, optimised: bool, packed: bool) -> tuple[float, float]:
    """Seconds and megabytes of opening a file."""
    command = [sys.executable, "-c", PROBE, str(path), str(int(optimised)), str(int(packed))]
    seconds, peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return seconds, peak


def size(path: Path) -> float:
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="How long models take to open, and what an optimised copy saves.")
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.onnx")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="openings of each way (default: 5)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where copies stay (default: nowhere)")
    arguments = parser.parse_args()
    for model in arguments.models:
        if not model.exists():
            parser.error(f"there is no file {model}")
    print(f"{'':44}{'MB on disk':>12}{'open, s':>10}{'relative':>10}{'peak MB':>10}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for number, model in enumerate(arguments.models):
            copy = folder / f"{number}-{model.stem}.onnx"
            write_optimized(model, copy, f"{copy.name}.data")
            ways = {
                "as it is": (model, False, True),
                "weights not packed": (model, False, False),
                "optimised copy": (copy, True, True),
            }
            found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            for _ in range(arguments.runs):
                for way, (path, optimised, packed) in ways.items():
                    found[way].append(opened(path, optimised=optimised, packed=packed))
            usual = statistics.median(seconds for seconds, _ in found["as it is"])
            print(model)
            for way, (path, *_) in ways.items():
                seconds = statistics.median(s for s, _ in found[way])
                peak = max(p for _, p in found[way])
                print(f"  {way:42}{size(path):12,.0f}{seconds:10.2f}{seconds / usual:10.2f}{peak:10,.0f}", flush=True)


if __name__ == "__main__":
    main()
