"""The benchmark beside other tools: onnxruntime's, and peers that cannot be run."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "peers.py"


def test_a_row_for_each_tool_or_the_reason(llama_optimum: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    python = tmp_path / "envs" / "quark" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'ImportError: no such tool' >&2\nexit 1\n")
    python.chmod(0o755)
    (tmp_path / "envs" / "quark" / "ready").touch()
    command = [
        sys.executable,
        SCRIPT,
        llama_optimum,
        text,
        "--envs",
        tmp_path / "envs",
        "--samples",
        2,
        "--seq-len",
        24,
    ]
    command += ["--peer", "onnxruntime", "--peer", "quarot", "--peer", "pieces", "--peer", "quark"]
    printed = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed]
    assert [row[0] for row in cells[2:]] == [
        "quantize_static",
        "quarot_onnx",
        "quarot_onnx, `--by-stages`",
        "AMD Quark",
    ]
    assert all(float(number.replace(",", "")) > 0 for row in cells[2:5] for number in row[1:])
    assert cells[2][3] == cells[2][5] == "1.00"
    assert cells[5][1:] == ["fails: ImportError: no such tool"]
    assert not list(llama_optimum.parent.glob("tmp*"))
