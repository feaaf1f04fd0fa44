"""What a model costs as it grows: time, processor time, memory and bytes of commands, beside `cp` of the same files.

    python benchmarks/scale.py MODEL.onnx [MODEL.onnx ...] [--task NAME] [--rounds N] [--jobs N] [--cold] [--text FILE]

Every task is a process of its own, watched from outside: its peak resident set and processor time are what the system
says of a child that ended, bytes are those that it asked the system to read and to write (/proc/PID/io, so Linux only;
what is mapped into memory is not in them). The ratio is the median over rounds of (task / cp in the same round). Before
each run the source is read once, or with --cold taken out of the page cache, and what was written before is on the disk
already. Outputs lie beside the model, and are removed at once. benchmarks/synthetic_llama.py writes models of any size.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

TASKS = {
    "rotate": "rotate {model} {out} --no-verify --quiet",
    "rotate+prove": "rotate {model} {out} --quiet",
    "w8": "quantize {model} {out} --scheme w8 --no-verify --no-check --quiet",
    "w4 RTN, no clip": "quantize {model} {out} --weights rtn --w-bits 4 --no-w-clip --w-groupsize 128 --no-verify "
    "--no-check --quiet",
    "w8a8 static": "quantize {model} {out} --scheme w8a8-static --calib-samples 4 --calib-seq-len 128 --by-stages "
    "--no-verify --no-check --quiet",
    "w4a8 GPTQ": "quantize {model} {out} --weights gptq --w-bits 4 --a-bits 8 --calib-samples 16 --calib-seq-len 256 "
    "--calib-own 0 --no-verify --no-check --quiet",
    "w4a8 Qronos": "quantize {model} {out} --weights qronos --w-bits 4 --a-bits 8 --no-verify --no-check --quiet",
    "rotate 1GB": "rotate {model} {out} --max-memory 1GB --quiet",
    "w8a8 static 1GB": "quantize {model} {out} --scheme w8a8-static --calib-samples 4 --calib-seq-len 128 "
    "--max-memory 1GB --quiet",
    "w4 RTN": "quantize {model} {out} --weights rtn --w-bits 4 --w-groupsize 128 --no-verify --no-check --quiet",
}


@dataclass(frozen=True)
class Cost:
    """Seconds, seconds of all processors in user and in system mode, megabytes."""

    wall: float
    user: float
    system: float
    peak: float
    read: float
    written: float


def run(command: list[str], errors: IO[str] | None = None) -> Cost:
    """Run a command to its end; what it writes on standard error goes to ``errors``, or to the terminal."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # its accounts are still open
    wall = time.perf_counter() - start
    lines = Path(f"/proc/{child.pid}/io").read_text().splitlines()
    io = {name: int(count) for name, count in (line.split(": ") for line in lines)}
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {child.returncode}")
    peak = usage.ru_maxrss * 1024 / 1e6
    return Cost(wall, usage.ru_utime, usage.ru_stime, peak, io["rchar"] / 1e6, io["wchar"] / 1e6)


def sources(model: Path) -> list[Path]:
    """The model file and its data."""
    return [path for path in (model, model.with_name(f"{model.name}.data")) if path.exists()]


def settle(files: list[Path], *, cold: bool) -> None:
    """Files in the page cache, or out of it, and nothing left to be written."""
    os.sync()
    for path in files:
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                continue
            while file.read(1 << 24):
                pass


def measure(model: Path, task: str, arguments: argparse.Namespace) -> Cost:
    """One task on one model."""
    files = sources(model)
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        if task == "cp":
            command = ["cp", *map(str, files), folder]
        else:
            words = [word.format(model=model, out=f"{folder}/out.onnx") for word in TASKS[task].split()]
            command = [sys.executable, "-m", "quarot_onnx", *words]
            command += ["--jobs", str(arguments.jobs)] if arguments.jobs else []
            command += ["--calib-text", str(arguments.text)] if arguments.text and "--calib-samples" in words else []
        settle(files, cold=arguments.cold)
        return run(command)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time, memory and bytes of commands, beside cp of the same files.")
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.onnx")
    parser.add_argument("--task", choices=TASKS, action="append", help="may be repeated (default: rotate)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds of all tasks (default: 3)")
    parser.add_argument("--jobs", type=int, metavar="N", help="threads (default: one per core)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="to calibrate on (default: Python's documentation)")
    parser.add_argument("--cold", action="store_true", help="the source is not in the page cache")
    arguments = parser.parse_args()
    tasks = ["cp", *(arguments.task or ["rotate"])]
    for model in arguments.models:
        size = sum(path.stat().st_size for path in sources(model)) / 1e6
        rounds = [{task: measure(model, task, arguments) for task in tasks} for _ in range(arguments.rounds)]
        print(f"{model}: {size:,.0f} MB, {os.cpu_count()} cores, source {'cold' if arguments.cold else 'warm'}")
        print(f"{'task':16}{'s':>8}{'/ cp':>7}{'user s':>8}{'sys s':>7}{'peak MB':>9}{'read MB':>10}{'written MB':>12}")
        for task in tasks:
            costs = [found[task] for found in rounds]
            wall, user, system = (
                statistics.median(getattr(c, name) for c in costs) for name in ("wall", "user", "system")
            )
            ratio = statistics.median(found[task].wall / found["cp"].wall for found in rounds)
            peak, read, written = (max(getattr(c, name) for c in costs) for name in ("peak", "read", "written"))
            times = f"{wall:8.1f}{ratio:7.2f}{user:8.1f}{system:7.1f}"
            print(f"{task:16}{times}{peak:9.0f}{read:10,.0f}{written:12,.0f}", flush=True)


if __name__ == "__main__":
    main()
