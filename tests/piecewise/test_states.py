"""Hidden states: the same arrays back from memory, from disk and from a file."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from quarot_onnx.piecewise.states import States

ARRAYS: dict[str, NDArray] = {
    "/model/layers.0/Add_1:output/0": np.random.default_rng(0).standard_normal((1, 5, 8)).astype(np.float32),
    "half": np.array([[1.5, np.nan]], np.float16),
    "mask": np.array([True, False]),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((1, 2, 0, 4), np.float32),
    "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
}


def filled(folder: Path, limit: int) -> States:
    states = States(folder, limit)
    for name, array in ARRAYS.items():
        states[0, name] = array
        states[11, name] = array[..., :1] if array.ndim else array
    return states


def same(states: States) -> None:
    for (sample, name), array in zip(states.keys(), map(states.__getitem__, states.keys()), strict=True):
        expected = ARRAYS[name] if sample == 0 or not ARRAYS[name].ndim else ARRAYS[name][..., :1]
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)
    assert len(list(states.keys())) == 2 * len(ARRAYS)


@pytest.mark.parametrize("limit", [0, 200, 1 << 20])
def test_what_goes_in_comes_out(limit: int, tmp_path: Path) -> None:
    states = filled(tmp_path / "spill", limit)
    same(states)
    on_disk = len(list((tmp_path / "spill").glob("*"))) if (tmp_path / "spill").exists() else 0
    # At 0 only arrays without any bytes stay in memory.
    assert {0: on_disk == 10, 200: 0 < on_disk < 10, 1 << 20: on_disk == 0}[limit]


@pytest.mark.parametrize("limit", [0, 200, 1 << 20])
def test_saved_and_loaded(limit: int, tmp_path: Path) -> None:
    filled(tmp_path / "a", limit).save(tmp_path / "states.zip")
    again = States(tmp_path / "b", limit)
    again.load(tmp_path / "states.zip")
    same(again)


def test_forgotten_arrays_give_back_their_room(tmp_path: Path) -> None:
    states, array = States(tmp_path / "spill", 100), np.zeros(25, np.float32)
    for round_ in range(5):
        states[round_, "x"] = array
        states[round_, "x"] = array + 1  # replaced, not added
        assert (states[round_, "x"] == 1).all()
        states.discard((round_, "x"))
        assert (round_, "x") not in states
        states.discard((round_, "x"))
    assert not (tmp_path / "spill").exists()
    states[0, "x"], states[1, "x"] = array, array
    assert len(list((tmp_path / "spill").iterdir())) == 1
    states.discard((1, "x"))
    assert not list((tmp_path / "spill").iterdir())
    with pytest.raises(KeyError):
        states[1, "x"]
