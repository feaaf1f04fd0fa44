"""The benchmark of R4's factors names every way and the one that is chosen."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quarot_onnx.hadamard.factoring import all_splits, hadamard_factors
from quarot_onnx.hadamard.orders import construct

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "online_rotation.py"


def test_ways_and_choice() -> None:
    command = [sys.executable, SCRIPT, "--size", "192", "--rows", "1", "3", "--rounds", "1"]
    printed = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in printed.splitlines()[3:]]
    assert rows[0][0] == "·".join(str(len(factor)) for factor in hadamard_factors(construct(192), 128))  # type: ignore[arg-type]
    assert rows[0][-1] == "chosen"
    assert rows[0][2] == rows[0][4] == "1.00"
    assert [row[:3] for row in rows[-1:]] == [["blocks", "of", "64"]]
    assert len(rows) > 4
    assert all(float(row[-1]) > 0 for row in rows[1:])


@pytest.mark.parametrize("size", [12, 64, 1536, 11008])
def test_all_splits_are_the_same_matrix(size: int) -> None:
    construction = construct(size)
    assert construction is not None
    splits = all_splits(construction)
    x = np.random.default_rng(0).standard_normal(size)
    results = []
    for widths, factors in splits.items():
        assert widths == tuple(map(len, factors))
        y = x
        for axis, factor in enumerate(factors):
            y = np.moveaxis(np.tensordot(y.reshape(widths), factor, axes=(axis, 0)), -1, axis)
        results.append(y.reshape(-1))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-9, atol=1e-9 * np.abs(results[0]).max())
