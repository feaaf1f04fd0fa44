"""``quantize`` lets the model write what it is calibrated on: by default, in part, and not where it cannot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from exports import dynamo_export
from passed import Asks

from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.generation.own_text import own_windows

SMALL = ("--calib-samples", 2, "--calib-seq-len", 16)
GPTQ = ("--w-bits", 4, "--weights", "gptq")


def test_what_the_model_writes_is_the_default(asks: Asks, model: Path) -> None:
    passed = asks(*GPTQ, *SMALL)
    assert passed.reader is not None
    np.testing.assert_array_equal(passed.reader.token_windows, own_windows(model, 2, 16))
    assert "note: calibrated on text that the model wrote; name text like what the model will meet" in passed.notes


@pytest.mark.parametrize("options", [("--scheme", "w8a8-static"), ("--calib-text", "text.txt", *GPTQ)], ids=str)
def test_elsewhere_it_is_not(
    asks: Asks, model: Path, options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    passed = asks(*options, *SMALL)
    assert passed.reader is not None
    text = "text.txt" if "--calib-text" in options else None
    expected = TextReader(model, text, samples=2, seq_len=16).token_windows
    np.testing.assert_array_equal(passed.reader.token_windows, expected)
    assert "calibrated on" not in passed.notes


def test_a_part_of_the_windows(asks: Asks, model: Path, tmp_path: Path) -> None:
    text, recipe = tmp_path / "text.txt", tmp_path / "recipe.yaml"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    recipe.write_text("weights: {bits: 4, method: gptq}\ncalibration: {samples: 3, seq_len: 16, own: 1}\n")
    for passed in (
        asks(*GPTQ, "--calib-samples", 3, "--calib-seq-len", 16, "--calib-own", 1, "--calib-text", text),
        asks("--recipe", recipe, "--calib-text", text),
    ):
        assert passed.reader is not None
        of_text = TextReader(model, text, samples=2, seq_len=16).token_windows
        expected = np.concatenate([of_text, own_windows(model, 1, 16)])
        np.testing.assert_array_equal(passed.reader.token_windows, expected)
        assert "calibrated on" not in passed.notes


@pytest.mark.parametrize("own", [(), ("--calib-own", 0)], ids=str)
def test_the_documentation_stands_in(asks: Asks, own: tuple[object, ...]) -> None:
    source = dynamo_export("llama")
    passed = asks(*GPTQ, *SMALL, *own, source=source)
    assert passed.reader is not None
    expected = TextReader(source, samples=2, seq_len=16).token_windows
    np.testing.assert_array_equal(passed.reader.token_windows, expected)
    assert "note: calibrated on Python's own documentation" in passed.notes
    assert ("writes none itself, as it has no cache" in passed.notes) == (not own)


def test_a_model_larger_than_the_memory_writes_nothing(asks: Asks) -> None:
    assert "writes none itself, as it does not fit into memory" in asks(*GPTQ, *SMALL, "--max-memory", "100kB").notes


def test_what_cannot_be_is_refused(refused_early: Callable[..., str]) -> None:
    message = refused_early(*GPTQ, *SMALL, "--calib-own", 3)
    assert "3 windows of the model's own text are more than the 2 that are calibrated on" in message
    message = refused_early(*GPTQ, *SMALL, "--calib-own", 1, source=dynamo_export("llama"))
    assert "cannot write text to be calibrated on, as it has no cache" in message
    assert "leave out --calib-own" in message


def test_it_goes_unused_where_nothing_is_calibrated(asks: Asks) -> None:
    assert "nothing is calibrated: --calib-own not used" in asks("--scheme", "w8", "--calib-own", 2).notes
