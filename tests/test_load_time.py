"""The benchmark of load times, and the copies that it writes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime

from quarot_onnx.calibration.feeds import ModelInputs

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "load_time.py"


def test_an_optimised_copy_computes_the_same(llama_optimum: Path, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, llama_optimum, "--runs", "1", "--keep", tmp_path / "kept"]
    printed = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in printed.splitlines()[2:]]
    assert [row[:-4] for row in rows] == [["as", "it", "is"], ["weights", "not", "packed"], ["optimised", "copy"]]
    assert rows[0][-2] == "1.00"
    assert all(float(row[-1]) > 20 for row in rows), "a process with onnxruntime is larger than 20 MB"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    inputs = ModelInputs.from_path(llama_optimum)
    feeds = inputs.feed(np.random.default_rng(0).integers(5, 100, (1, 12)))
    exact, found = (
        onnxruntime.InferenceSession(path, given, providers=["CPUExecutionProvider"]).run([inputs.logits], feeds)[0]
        for path, given in ((llama_optimum, None), (tmp_path / "kept" / "0-model.onnx", options))
    )
    np.testing.assert_array_equal(found, exact)
