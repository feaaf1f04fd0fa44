# ruff: noqa: PLC0415 - a task imports what it needs, and its parent nothing of that
"""Peak memory of rotating and quantizing a model, and of onnxruntime's quantize_static on the same model.

    python benchmarks/memory.py MODEL.onnx [--samples N] [--seq-len L] [--task TASK]

Every task runs in a process of its own, which reads its peak resident set (VmHWM in /proc/self/status, so Linux only)
when it is done. ru_maxrss would mislead: a child inherits it from its parent at fork. All quantizing tasks write W8A8
static models, calibrated by min-max on the same text. `quantize_static` is onnxruntime's; `imports` only
imports what the others need.
"""

import argparse
import contextlib
import io
import logging
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def imports(_model: Path, _out: Path, _arguments: argparse.Namespace) -> None:
    import onnxruntime.quantization  # noqa: F401

    import quarot_onnx.pipeline  # noqa: F401


def rotate(model: Path, out: Path, _arguments: argparse.Namespace) -> None:
    from quarot_onnx.config.algorithm import QuarotConfig
    from quarot_onnx.pipeline import rotate

    rotate(model, out, QuarotConfig(), verify=False)


def quantize(
    model: Path, out: Path, arguments: argparse.Namespace, *, rotated: bool = False, checked: bool = True
) -> None:
    from quarot_onnx import Check, Int8Spec, ModelQuantizer, QConfig, QLayerConfig, QuarotConfig, UInt8Spec
    from quarot_onnx.calibration.readers import TextReader

    layer = QLayerConfig(UInt8Spec(), Int8Spec(quant_granularity="Channel"))
    reader = TextReader(model, samples=arguments.samples, seq_len=arguments.seq_len)
    config = QConfig(layer, algo_config=[QuarotConfig()] if rotated else [])
    check = Check() if checked else None
    ModelQuantizer(config).quantize_model(model, out, reader, verify=False, check=check)


def quantize_unchecked(model: Path, out: Path, arguments: argparse.Namespace) -> None:
    quantize(model, out, arguments, checked=False)


def rotate_and_quantize(model: Path, out: Path, arguments: argparse.Namespace) -> None:
    quantize(model, out, arguments, rotated=True)


def quantize_static(model: Path, out: Path, arguments: argparse.Namespace) -> None:
    from onnxruntime.quantization import CalibrationDataReader
    from peers import static_int8  # beside this file

    from quarot_onnx.calibration.readers import TextReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.text = TextReader(model, samples=arguments.samples, seq_len=arguments.seq_len)

        def get_next(self) -> dict | None:
            return self.text.get_next()

    out.parent.mkdir(parents=True)
    static_int8(model, out, Reader())


TASKS = {
    "imports": imports,
    "rotate": rotate,
    "quantize": quantize,
    "quantize, no check": quantize_unchecked,
    "rotate+quantize": rotate_and_quantize,
    "quantize_static": quantize_static,
}


def peak_megabytes() -> float:
    """The peak resident set of this process."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1e3


def work(arguments: argparse.Namespace) -> None:
    """One task, in a child process; its last line on standard output is peak and seconds."""
    logging.disable(logging.WARNING)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        TASKS[arguments.task[-1]](arguments.model.absolute(), Path(folder) / "out" / "model.onnx", arguments)
    print(peak_megabytes(), time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of rotating and quantizing a model.")
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="calibration windows (default: 8)")
    parser.add_argument("--seq-len", type=int, default=256, metavar="L", help="tokens of a window (default: 256)")
    parser.add_argument("--task", choices=TASKS, action="append", help="this task only; may be repeated (default: all)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.model.exists():
        parser.error(f"there is no file {arguments.model}")
    if arguments.child:
        work(arguments)
        return
    data = arguments.model.with_name(f"{arguments.model.name}.data")
    size = arguments.model.stat().st_size + (data.stat().st_size if data.exists() else 0)
    print(f"{arguments.model}: {size / 1e6:.0f} MB, {arguments.samples} windows of {arguments.seq_len} tokens")
    print(f"{'task':20}{'peak RSS (MB)':>14}{'seconds':>9}")
    for task in arguments.task or TASKS:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", "--task", task]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peak, seconds = map(float, done.stdout.splitlines()[-1].split())
        print(f"{task:20}{peak:14.0f}{seconds:9.1f}", flush=True)


if __name__ == "__main__":
    main()
