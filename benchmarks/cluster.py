"""What workers of a cluster send, read and write while weights are rounded: a cost model, beside measured runs.

    python benchmarks/cluster.py --shape llama-3-70b --samples 128 --seq-len 2048 --workers 16
    python benchmarks/cluster.py MODEL.onnx --text train.txt --samples 12 --seq-len 512 --workers 2 [--method qronos]

The first form prints what the model says of a shape. The second one rounds MODEL to 4 bits twice, here alone and with a
Dask cluster of this machine, and prints what was measured of the second run beside what the model says of it, and
whether both wrote the same bytes. MODEL's shape is that of its config, or --shape and --layers. What goes over the
network is what the loopback device counted meanwhile (Linux), so nothing else should use it; what workers wrote is
their wchar in /proc/PID/io, in which sockets are not.

Of each stage, n its inputs, and each unit of 2,048 tokens come half of a matrix n x n in float32, and for GPTAQ and
Qronos a whole one more; or, where units are many or wide, these sums once, in float64. Hidden states, rounded weights
and the model's own are read from the storage that all share.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from distributed import Client, LocalCluster
from synthetic_llama import SHAPES, Sizes

from quarot_onnx.calibration.hessian import PANEL
from quarot_onnx.calibration.units import units
from quarot_onnx.stages.spread import by_panels
from quarot_onnx.threads import panels

LARGER = {
    "llama-3-70b": Sizes(128256, 8192, 28672, 80, 64, 8),
    "llama-3.1-405b": Sizes(128256, 16384, 53248, 126, 128, 8),
}
DRIFT = {"gptq": False, "gptaq": True, "qronos": True}


@dataclass(frozen=True)
class Stage:
    """Linears that read one value: its width, the sum of their outputs, and of what width it leaves for later."""

    name: str
    inputs: int
    outputs: int
    leaves: int


def stages(sizes: Sizes) -> list[Stage]:
    """Of a decoder block; the residual stream is left by the segments before q k v and before gate up."""
    heads, keys = sizes.heads * sizes.head_dim, 2 * sizes.kv_heads * sizes.head_dim
    hidden, wide = sizes.hidden, sizes.intermediate
    return [
        Stage("q k v", hidden, heads + keys, 2 * hidden),
        Stage("o", heads, hidden, heads),
        Stage("gate up", hidden, 2 * wide, 2 * hidden),
        Stage("down", wide, hidden, wide),
    ]


@dataclass(frozen=True)
class Work:
    """Samples of one length, a method, and who helps."""

    samples: int
    seq_len: int
    method: str
    workers: int
    bytes_of_float: int
    threads: int = 1

    @property
    def tokens(self) -> int:
        return self.samples * self.seq_len

    @property
    def drift(self) -> bool:
        return DRIFT[self.method]

    @property
    def paths(self) -> int:
        return 2 if self.drift else 1

    def portions(self) -> int:
        """Partial products: one for each unit, more where a sample is longer."""
        found = units([self.seq_len] * self.samples)
        return sum(-(-len(unit) * self.seq_len // 2048) for unit in found)

    def sent(self, stage: Stage) -> int:
        """Bytes of statistics over the network."""
        half = sum((panel.stop - panel.start) * panel.stop for panel in panels(stage.inputs, PANEL))
        numbers = half + (stage.inputs**2 if self.drift else 0)
        return 8 * numbers if self.wide(stage) else 4 * self.portions() * numbers

    def wide(self, stage: Stage) -> bool:
        """Whether workers sum panels over all units."""
        threads = self.workers * self.threads
        return by_panels(stage.inputs, self.portions(), follow_float=self.drift, threads=threads)

    def written(self, stage: Stage) -> int:
        """Bytes of hidden states on shared storage."""
        return self.paths * self.bytes_of_float * self.tokens * stage.leaves

    def read(self, stage: Stage) -> int:
        """Bytes from shared storage by all workers, each of which keeps what it read for its threads.

        Weights: rounded ones (a byte each), and on the float path the model's. Where panels are summed, all rows.
        """
        weights = stage.inputs * stage.outputs * (1 + (self.bytes_of_float if self.drift else 0))
        rows = self.paths * self.bytes_of_float * self.tokens * stage.inputs if self.wide(stage) else 0
        return self.workers * (weights + rows)

    def flops(self, stage: Stage) -> float:
        """Of all workers: products with weights on each path, and the sums; attention is left out."""
        forward = 2.0 * self.tokens * stage.inputs * stage.outputs * self.paths
        return forward + self.tokens * float(stage.inputs) ** 2 * (3 if self.drift else 1)


def held(sizes: Sizes, work: Work) -> tuple[float, float]:
    """GB of statistics where they are summed (H, D and H's factor in float64), and of one result in a worker."""
    widest = max(stage.inputs for stage in stages(sizes))
    results = [
        work.sent(stage) / (work.workers * work.threads if work.wide(stage) else work.portions())
        for stage in stages(sizes)
    ]
    return 8e-9 * widest**2 * (3 if work.drift else 2), max(results) / 1e9


def tell(name: str, sizes: Sizes, work: Work, gbit: float, gflops: float) -> None:
    """What the cost model says."""
    who = f"{work.workers} workers of {work.threads} threads"
    print(f"{name}: {work.samples} x {work.seq_len} tokens, {work.method}, {who}, per layer")
    print(f"{'stage':9}{'inputs':>8}{'sums':>8}{'sent GB':>10}{'states written GB':>19}{'read GB':>10}{'Tflop':>8}")
    for stage in stages(sizes):
        row = work.sent(stage), work.written(stage), work.read(stage)
        sent, written, read = (f"{amount / 1e9:.3f}" for amount in row)
        sums = "panels" if work.wide(stage) else "units"
        print(
            f"{stage.name:9}{stage.inputs:8}{sums:>8}{sent:>10}{written:>19}{read:>10}{work.flops(stage) / 1e12:8.1f}"
        )
    every = [
        sizes.layers * sum(map(amount, stages(sizes))) for amount in (work.sent, work.written, work.read, work.flops)
    ]
    sent, written, read, flops = every
    summed, result = held(sizes, work)
    print(
        f"{sizes.layers} layers: sent {sent / 1e12:.2f} TB ({sent * 8 / gbit / 1e9 / 3600:.1f} h at {gbit:g} Gbit/s), "
        f"states {written / 1e12:.2f} TB, read {read / 1e12:.2f} TB, {flops / 1e15:.1f} Pflop "
        f"({flops / gflops / 1e9 / 3600:,.0f} core hours at {gflops:g} Gflop/s); memory: "
        f"{summed:.1f} GB of statistics where they are summed, {result:.2f} GB for each result in a worker\n"
    )


def usage() -> tuple[int, float, int]:
    """Of a worker: its process, user seconds, bytes written."""
    lines = Path("/proc/self/io").read_text().splitlines()
    io = {name: int(count) for name, count in (line.split(": ") for line in lines)}
    return os.getpid(), resource.getrusage(resource.RUSAGE_SELF).ru_utime, io["wchar"]


def loopback() -> int:
    """Bytes that the loopback device received."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def digest(folder: Path) -> str:
    """Of the model that was written."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("model.onnx*")):
        found.update(path.read_bytes())
    return found.hexdigest()


def rounded(arguments: argparse.Namespace, method: str, folder: Path, scheduler: str | None) -> tuple[float, float]:
    """Round the model to 4 bits; seconds, and user seconds of the command."""
    words = [sys.executable, "-m", "quarot_onnx", "quantize", arguments.model, folder, "--weights", method]
    words += ["--w-bits", 4, "--a-bits", 8, "--no-verify", "--no-check", "--quiet", "--calib-text", arguments.text]
    words += ["--calib-samples", arguments.samples, "--calib-seq-len", arguments.seq_len, "--calib-own", 0]
    words += ["--scheduler", scheduler] if scheduler else []
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, time.perf_counter()
    subprocess.run([str(word) for word in words], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def measure(arguments: argparse.Namespace, method: str, sizes: Sizes) -> None:
    """Both runs, and the model beside the second."""
    work = Work(arguments.samples, arguments.seq_len, method, arguments.workers, arguments.bytes_of_float)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        here, there = Path(name) / "here", Path(name) / "there"
        alone, alone_user = rounded(arguments, method, here, None)
        with (
            LocalCluster(
                n_workers=arguments.workers, threads_per_worker=1, memory_limit=0, local_directory=name
            ) as own,
            Client(own) as client,
        ):
            client.wait_for_workers(arguments.workers)
            before, moved = client.run(usage), loopback()
            wall, user = rounded(arguments, method, there, own.scheduler_address)
            moved, after = loopback() - moved, client.run(usage)
        spent = sum(after[worker][1] - before[worker][1] for worker in after)
        wrote = sum(after[worker][2] - before[worker][2] for worker in after)
        same = digest(here) == digest(there)
    total = {
        name: sizes.layers * sum(map(amount, stages(sizes)))
        for name, amount in (("sent", work.sent), ("written", work.written), ("flops", work.flops))
    }
    print(
        f"{method}, {work.samples} x {work.seq_len} tokens, {work.workers} workers: the same bytes: {same}; "
        f"network {moved / 1e6:,.0f} MB (model {total['sent'] / 1e6:,.0f}), states written {wrote / 1e6:,.0f} MB "
        f"(model {total['written'] / 1e6:,.0f}); {total['flops'] / spent / 1e9:.1f} Gflop a user second of workers; "
        f"s alone {alone:.1f} (user {alone_user:.1f}), with workers {wall:.1f} (user {user:.1f}, workers {spent:.1f})",
        flush=True,
    )


def sizes_of(model: Path) -> Sizes:
    """The shape that a genai_config.json or a config.json beside a model tells."""
    genai, plain = model.with_name("genai_config.json"), model.with_name("config.json")
    if genai.is_file():
        decoder = json.loads(genai.read_text())["model"]["decoder"]
        from quarot_onnx.graph.linear import linears  # noqa: PLC0415
        from quarot_onnx.io import model_io  # noqa: PLC0415

        down = next(linear for linear in linears(model_io.load(model).graph) if "down_proj" in linear.name)
        heads, keys = decoder["num_attention_heads"], decoder["num_key_value_heads"]
        hidden, layers, size = decoder["hidden_size"], decoder["num_hidden_layers"], decoder["head_size"]
        return Sizes(0, hidden, down.in_features, layers, heads, keys, size)
    found = json.loads(plain.read_text())
    heads, keys = found["num_attention_heads"], found["num_key_value_heads"]
    size = found.get("head_dim") or found["hidden_size"] // heads
    return Sizes(0, found["hidden_size"], found["intermediate_size"], found["num_hidden_layers"], heads, keys, size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What moves between the workers of a cluster, by model and by measure."
    )
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL.onnx")
    parser.add_argument(
        "--shape", choices=SHAPES | LARGER, action="append", default=[], help="may be repeated; MODEL's"
    )
    parser.add_argument("--layers", type=int, default=1, help="of MODEL, beside its --shape (default: 1)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="to calibrate on")
    parser.add_argument("--method", choices=DRIFT, action="append", help="may be repeated (default: gptq, qronos)")
    parser.add_argument("--samples", type=int, default=128, help="windows (default: 128)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of each (default: 2048)")
    parser.add_argument("--workers", type=int, default=2, help="(default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="of each, in the first form (default: 1)")
    parser.add_argument("--bytes-of-float", type=int, default=0, help="of the model (default: 2 of a shape, else 4)")
    parser.add_argument("--gbit", type=float, default=25, help="of the network where sums are made (default: 25)")
    parser.add_argument("--gflops", type=float, default=25, help="of a core, as the second form measures (default: 25)")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="for outputs (default: the system's)")
    arguments = parser.parse_args()
    methods = arguments.method or ["gptq", "qronos"]
    shown = [] if arguments.model is not None else arguments.shape
    for name in shown:
        for method in methods:
            floats = arguments.bytes_of_float or 2
            work = Work(arguments.samples, arguments.seq_len, method, arguments.workers, floats, arguments.threads)
            tell(name, (SHAPES | LARGER)[name], work, arguments.gbit, arguments.gflops)
    if arguments.model is not None:
        arguments.bytes_of_float = arguments.bytes_of_float or 4
        given = [replace((SHAPES | LARGER)[name], layers=arguments.layers) for name in arguments.shape]
        for method in methods:
            measure(arguments, method, given[0] if given else sizes_of(arguments.model))


if __name__ == "__main__":
    main()
