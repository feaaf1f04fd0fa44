"""Do two states of the code write the same files? Every scheme and method, as hashes, kept and compared.

::

    python benchmarks/same_outputs.py model.onnx before.json    # writes before.json
    ...                                                         # the code is changed
    python benchmarks/same_outputs.py model.onnx after.json --before before.json

The second command lists what differs and ends with status 1 if anything does. Equal hashes need equal packages, one
processor and ``OMP_NUM_THREADS=1``: sums in another order round differently. ``--only`` picks runs whose names contain
a word. Rounding is calibrated on few windows of Python's documentation; SmolLM2 takes about ten minutes.
"""

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

METHODS = ("rtn", "gptq", "gptaq", "qronos")

EIGHT_BITS = {
    "w8a8-dynamic": "--scheme w8a8-dynamic",
    "w8a8-dynamic/int8": "--scheme w8a8-dynamic --weight-type int8 --per-tensor --embedding int8",
    "w8a8-dynamic/asym": "--scheme w8a8-dynamic --w-asym --lm-head float",
    "w8a8-static": "--scheme w8a8-static",
    "w8a8-static/percentile": "--scheme w8a8-static --calib-method percentile --a-sym --no-rotate",
    "w8": "--scheme w8 --lm-head int8 --embedding int8",
    "w8/asym": "--scheme w8 --w-asym --weight-type uint8 --no-rotate",
}

LOW_BITS = {
    "w4a16": "--w-bits 4",
    "w4a8": "--w-bits 4 --a-bits 8 --lm-head int8",
    "w4a4": "--w-bits 4 --a-bits 4 --a-clip-ratio 0.9",
    "w4g32": "--w-bits 4 --w-groupsize 32 --w-asym --embedding int4 --lm-head int4",
    "w7a8": "--w-bits 7 --a-bits 8",
    "w3a5": "--w-bits 3 --a-bits 5 --a-asym --w-asym --no-w-clip --random-had --seed 7",
    "w4a8/down8": "--w-bits 4 --a-bits 8 --int8-down-proj --no-rotate",
}

ROTATIONS = {"r": "", "r/random": "--random-had --seed 3", "r/r1": "--no-r2 --no-r4", "r/r2r3": "--no-r1 --r3 --no-r4"}


def runs() -> Iterator[tuple[str, list[str]]]:
    """The name of every run, and its command without the files."""
    for name, options in ROTATIONS.items():
        yield name, ["rotate", "--no-verify", *shlex.split(options)]
    for name, options in EIGHT_BITS.items():
        yield name, ["quantize", *shlex.split(options)]
    for name, options in LOW_BITS.items():
        for method in METHODS:
            text = [] if method == "rtn" else ["--calib-own", "0"]
            yield f"{name}/{method}", ["quantize", *shlex.split(options), "--weights", method, *text]


def written(model: Path, command: list[str], windows: list[str]) -> dict[str, str]:
    """The SHA-256 of every file of an output."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out" / "model.onnx"
        task, *options = command
        more = ["--no-verify", "--no-check", *windows] if task == "quantize" else []
        line = [sys.executable, "-m", "quarot_onnx", task, str(model), str(target), *options, *more, "--quiet"]
        done = subprocess.run(line, check=False, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
        files = sorted(path for path in target.parent.iterdir() if path.suffix != ".json")
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("hashes", type=Path, help="JSON to write; runs that it holds already are not done again")
    parser.add_argument("--before", type=Path, help="JSON to compare with")
    parser.add_argument("--only", default="", help="runs whose names contain this")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    args = parser.parse_args()
    windows = ["--calib-samples", str(args.samples), "--calib-seq-len", str(args.seq_len)]
    known = json.loads(args.hashes.read_text()) if args.hashes.is_file() else {}
    for name, command in runs():
        if args.only in name and name not in known:
            known[name] = written(args.model, command, windows)
            args.hashes.write_text(json.dumps(known, indent=1))
            print(name, flush=True)
    if args.before is None:
        return
    before = json.loads(args.before.read_text())
    shared = [name for name in known if name in before]
    different = [name for name in shared if known[name] != before[name]]
    print(f"{len(shared) - len(different)} of {len(shared)} the same", *different, sep="\n")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
