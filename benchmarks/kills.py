"""Runs killed at random moments: nothing half written, the input untouched, the next run as if nothing had been.

    python benchmarks/kills.py MODEL.onnx [--kills 20] [--seed 0] [--task NAME] [--text TEXT.txt]

Every task is done once undisturbed. Then it is started and killed (SIGKILL, which no process can clean up after) at a
random moment of that time, as often as is asked for, tasks in turn. After each kill there must be no file at the
output's place or beside it, but for the run's own hidden folder, and the model's files must have the hashes that they
had; then the same command runs to its end, and must leave the files of the undisturbed run and no hidden folder. A
kill may come when all is written: then the output must be whole. Exit status 1, and the reason, if any of this fails.
"""

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

TASKS = {
    "rotate": "rotate {model} {out} --no-verify",
    "rotate+prove": "rotate {model} {out}",
    "w4 RTN": "quantize {model} {out} --weights rtn --w-bits 4 --no-w-clip --w-groupsize 128 --no-verify --no-check",
    "w4a8 GPTQ": "quantize {model} {out} --weights gptq --w-bits 4 --a-bits 8 --calib-samples 2 --calib-seq-len 64 "
    "--calib-own 0 --no-verify --no-check",
}
"""Those that calibrate take a text as well."""


def hashes(files: list[Path]) -> dict[str, str]:
    """SHA-256 by name."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def written(folder: Path) -> dict[str, str]:
    """What users see in a folder; the record of a run tells of its time and is left out."""
    seen = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    return hashes([path for path in seen if not path.name.endswith(".quarot.json")])


def hidden(folder: Path) -> list[Path]:
    """What runs keep for themselves."""
    return [path for path in folder.iterdir() if path.name.startswith(".")]


@dataclass
class Task:
    """A command on a model, and what it is to write.

    Attributes:
        command: Its words.
        folder: Where its output goes.
        seconds: What it took undisturbed, the last time.
        expected: Hashes of the files of the undisturbed run.
        problems: What went wrong.
        outcomes: What each kill met.
    """

    command: list[str]
    folder: Path
    seconds: float = 0.0
    expected: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)

    def run(self) -> dict[str, str]:
        """To the end, and what is there then."""
        start = time.perf_counter()
        done = subprocess.run(self.command, check=False, capture_output=True, text=True)
        self.seconds = time.perf_counter() - start
        if done.returncode:
            self.problems.append(f"ended with status {done.returncode}: {done.stderr.strip()}")
        if left := hidden(self.folder):
            self.problems.append(f"left {[path.name for path in left]} behind")
        return written(self.folder)

    def kill(self, delay: float) -> None:
        """Start, kill, look, and run again."""
        child = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            child.wait(delay)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
        if child.returncode not in (0, -signal.SIGKILL):
            self.problems.append(f"ended with status {child.returncode} before it was killed")
        seen = written(self.folder)
        if seen and seen != self.expected:
            self.problems.append(f"killed after {delay:.1f} s, and there was {sorted(seen)}, not what it is to be")
        blocks = any(any(path.glob("block-*")) for path in hidden(self.folder))
        self.outcomes.append("ended" if child.returncode == 0 else "whole" if seen else "blocks" if blocks else "none")
        self.clear()
        if self.run() != self.expected:
            self.problems.append(f"killed after {delay:.1f} s; the next run wrote something else")
        self.clear()

    def clear(self) -> None:
        """Remove what users see."""
        for path in self.folder.iterdir():
            if not path.name.startswith("."):
                path.unlink()


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="of all tasks together (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--task", choices=TASKS, action="append", help="may be repeated (default: all)")
    parser.add_argument("--text", type=Path, help="what is calibrated on (default: Python's documentation)")
    arguments = parser.parse_args()
    sources = [path for path in sorted(arguments.model.parent.iterdir()) if path.is_file()]
    before, moments, names = hashes(sources), random.Random(arguments.seed), arguments.task or list(TASKS)
    with tempfile.TemporaryDirectory(dir=arguments.model.parent) as scratch:
        tasks = {}
        for number, name in enumerate(names):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            words = [word.format(model=arguments.model, out=folder / "out.onnx") for word in TASKS[name].split()]
            words += ["--calib-text", str(arguments.text)] if "--calib-samples" in words and arguments.text else []
            task = tasks[name] = Task([sys.executable, "-m", "quarot_onnx", *words, "--quiet"], folder)
            task.expected = task.run()
            task.clear()
            print(f"{name}: {task.seconds:.1f} s undisturbed", flush=True)
        for number in range(arguments.kills):
            name = names[number % len(names)]
            task = tasks[name]
            delay = moments.uniform(0.0, task.seconds)
            task.kill(delay)
            if hashes(sources) != before:
                task.problems.append(f"killed after {delay:.1f} s: the model's files are not what they were")
            print(f"{number + 1}: {name} killed after {delay:.1f} s: {task.outcomes[-1]}", flush=True)
    problems = [f"{name}: {problem}" for name, task in tasks.items() for problem in task.problems]
    print(f"{arguments.kills} kills, {len(problems)} problems", *problems, sep="\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
