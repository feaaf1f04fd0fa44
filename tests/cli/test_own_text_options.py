"""``quantize`` lets the model write what it is calibrated on: by default, in part, and not where it cannot."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from exports import dynamo_export, optimum_export
from onnx import helper, numpy_helper
from passed import Asks

from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.cli import calibrating
from quarot_onnx.generation.own_text import own_windows


@pytest.fixture(autouse=True)
def quick_text() -> None:
    """What the model writes itself, here."""


SMALL = ("--calib-samples", 2, "--calib-seq-len", 16)
GPTQ = ("--w-bits", 4, "--weights", "gptq")


def test_what_the_model_writes_is_the_default(asks: Asks, model: Path) -> None:
    passed = asks(*GPTQ, *SMALL)
    assert passed.reader is not None
    np.testing.assert_array_equal(passed.reader.token_windows, own_windows(model, 2, 16))
    assert "note: calibrated on text that the model wrote; name text like what the model will meet" in passed.notes


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    return path


def both(model: Path, text: Path, samples: int, own: int) -> np.ndarray:
    """Windows of a text, and those that the model writes behind them."""
    of_text = TextReader(model, text, samples=samples, seq_len=16).token_windows
    return np.concatenate([of_text, own_windows(model, own, 16)])


def test_beside_a_text_the_model_writes_as_much(asks: Asks, model: Path, text: Path) -> None:
    passed = asks(*GPTQ, *SMALL, "--calib-text", text)
    assert passed.reader is not None
    np.testing.assert_array_equal(passed.reader.token_windows, both(model, text, 2, 2))
    told = f"note: calibrated on 2 windows of {text} and 2 that the model wrote (--calib-own 0 leaves them out)"
    assert told in passed.notes


def test_beside_much_text_it_writes_some(asks: Asks, model: Path, text: Path) -> None:
    passed = asks(*GPTQ, "--calib-samples", 20, "--calib-seq-len", 16, "--calib-text", text)
    assert passed.reader is not None
    np.testing.assert_array_equal(passed.reader.token_windows, both(model, text, 20, 16))


@pytest.mark.parametrize("options", [("--scheme", "w8a8-static"), ("--calib-own", 0, *GPTQ)], ids=str)
@pytest.mark.parametrize("named", [True, False])
def test_elsewhere_it_writes_nothing(
    asks: Asks, model: Path, options: tuple[object, ...], named: bool, text: Path
) -> None:
    passed = asks(*options, *SMALL, *(("--calib-text", text) if named else ()))
    assert passed.reader is not None
    expected = TextReader(model, text if named else None, samples=2, seq_len=16).token_windows
    np.testing.assert_array_equal(passed.reader.token_windows, expected)
    assert "the model wrote" not in passed.notes


def test_as_many_as_are_asked_for(asks: Asks, model: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("weights: {bits: 4, method: gptq}\ncalibration: {samples: 3, seq_len: 16, own: 1}\n")
    for passed in (
        asks(*GPTQ, "--calib-samples", 3, "--calib-seq-len", 16, "--calib-own", 1, "--calib-text", text),
        asks("--recipe", recipe, "--calib-text", text),
    ):
        assert passed.reader is not None
        np.testing.assert_array_equal(passed.reader.token_windows, both(model, text, 3, 1))
        assert "calibrated on" not in passed.notes
    passed = asks(*GPTQ, "--calib-seq-len", 16, "--calib-own", 3)
    assert passed.reader is not None
    np.testing.assert_array_equal(passed.reader.token_windows, own_windows(model, 3, 16))


@pytest.mark.parametrize(
    ("options", "of_text"), [((*GPTQ, *SMALL), 2), (("--scheme", "w8a8-static", "--calib-seq-len", 16), 16)], ids=str
)
def test_beside_the_documentation(asks: Asks, model: Path, options: tuple[object, ...], of_text: int) -> None:
    """Where numbers of both are typed, and where it is what ranges are taken on."""
    passed = asks(*options, "--calib-own", 3)
    assert passed.reader is not None
    expected = np.concatenate([TextReader(model, samples=of_text, seq_len=16).token_windows, own_windows(model, 3, 16)])
    np.testing.assert_array_equal(passed.reader.token_windows, expected)


def test_text_alone_where_the_model_cannot_write(asks: Asks, text: Path) -> None:
    source = dynamo_export("llama")
    passed = asks(*GPTQ, *SMALL, "--calib-text", text, source=source)
    assert passed.reader is not None
    expected = TextReader(source, text, samples=2, seq_len=16).token_windows
    np.testing.assert_array_equal(passed.reader.token_windows, expected)
    assert f"note: calibrated on {text} alone (the model writes none itself: it has no cache" in passed.notes
    of_small = asks(*GPTQ, *SMALL, "--calib-text", text, "--max-memory", "100kB").notes
    assert f"note: calibrated on {text} alone (the model writes none itself: it does not fit into memory" in of_small


@pytest.mark.parametrize("own", [(), ("--calib-own", 0)], ids=str)
def test_the_documentation_stands_in(asks: Asks, own: tuple[object, ...]) -> None:
    source = dynamo_export("llama")
    passed = asks(*GPTQ, *SMALL, *own, source=source)
    assert passed.reader is not None
    expected = TextReader(source, samples=2, seq_len=16).token_windows
    np.testing.assert_array_equal(passed.reader.token_windows, expected)
    assert "note: calibrated on Python's own documentation" in passed.notes
    assert ("writes none itself: it has no cache" in passed.notes) == (not own)


def test_a_model_larger_than_the_memory_writes_nothing(asks: Asks) -> None:
    assert "writes none itself: it does not fit into memory" in asks(*GPTQ, *SMALL, "--max-memory", "100kB").notes


def one_row(folder: Path) -> Path:
    """A model whose batch is 1 inside, whatever its inputs say."""
    source = optimum_export("llama")
    for file in source.parent.iterdir():
        shutil.copy(file, folder / file.name)
    model = onnx.load(source)
    shape = numpy_helper.from_array(np.array([1, -1], np.int64), "one_row")
    model.graph.initializer.append(shape)
    for node in model.graph.node:
        node.input[:] = ["ids_of_one_row" if name == "input_ids" else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Reshape", ["input_ids", "one_row"], ["ids_of_one_row"]))
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_a_model_that_fails_in_writing_is_calibrated_all_the_same(asks: Asks, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    passed = asks(*GPTQ, *SMALL, source=one_row(folder))
    assert "writes none itself: onnxruntime cannot run the model on input_ids [2, 2]" in passed.notes
    assert passed.reader is not None
    assert passed.reader.token_windows.shape == (2, 16)


@pytest.mark.parametrize(
    "options",
    [("--no-check", "--check-tokens", 12), ("--fix-shape", "nope=1")],
    ids=str,
)
def test_mistakes_are_told_before_anything_is_written(
    refused_early: Callable[..., str], monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...]
) -> None:
    monkeypatch.setattr(calibrating, "own_windows", lambda *_, **__: pytest.fail("wrote text"))
    refused_early(*GPTQ, *SMALL, *options)


def test_what_cannot_be_is_refused(refused_early: Callable[..., str]) -> None:
    message = refused_early(*GPTQ, *SMALL, "--calib-own", 1, source=dynamo_export("llama"))
    assert "cannot write text to be calibrated on, as it has no cache" in message
    assert "leave out --calib-own" in message
    assert "does not fit into memory" in refused_early(*GPTQ, *SMALL, "--calib-own", 1, "--max-memory", "100kB")


def test_it_goes_unused_where_nothing_is_calibrated(asks: Asks) -> None:
    assert "nothing is calibrated: --calib-own not used" in asks("--scheme", "w8", "--calib-own", 2).notes
