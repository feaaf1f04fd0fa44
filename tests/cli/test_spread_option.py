"""Which windows of a text ``quantize`` calibrates on."""

import json
from pathlib import Path

import numpy as np
from passed import Asks

from quarot_onnx.calibration.readers import TextReader


def test_the_command_line_and_a_recipe_choose(asks: Asks, model: Path, tmp_path: Path) -> None:
    path, recipe = tmp_path / "text.txt", tmp_path / "recipe.json"
    path.write_text("".join(f"The {i}th quick brown fox jumps over the lazy dog.\n" for i in range(300)))
    recipe.write_text(json.dumps({"weights": {"bits": 4}, "calibration": {"spread": False}}))
    few = ("--calib-text", path, "--calib-samples", 2, "--calib-seq-len", 16)
    static = ("--scheme", "w8a8-static", *few)
    for spread, options in (
        (True, static),
        (True, (*static, "--calib-spread")),
        (False, (*static, "--no-calib-spread")),
        (False, ("--recipe", tmp_path / "recipe.json", "--calib-text", path)),
    ):
        reader = asks(*options).reader
        assert isinstance(reader, TextReader)
        assert reader.spread is spread
        assert reader.record["spread"] is spread
        size = reader.token_windows.shape[1]
        wanted = TextReader(model, path, samples=reader.of_text, seq_len=size, spread=spread).token_windows
        np.testing.assert_array_equal(reader.token_windows[: reader.of_text], wanted)


def test_who_asks_for_windows_from_all_over_is_told_where_there_are_none(asks: Asks, text: Path) -> None:
    few = ("--scheme", "w8a8-static", "--calib-samples", 42, "--calib-seq-len", 64, "--calib-text", text)
    for options in ((), ("--calib-spread",)):
        passed = asks(*few, *options)
        assert passed.reader is not None
        assert not passed.reader.spread
        (note,) = (note for note in passed.reader.notes if "from the start" in note)
        assert f"from the start of {text} and are not from all over it: part " in note
    assert not any("from the start" in note for note in asks(*few, "--no-calib-spread").reader.notes)
