import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
import tiny_decoders as tiny
from onnxruntime.quantization import CalibrationDataReader

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.readers import NpzReader, TextReader, TokenReader, wrap
from quarot_onnx.calibration.text import Bos
from quarot_onnx.errors import CalibrationError


@pytest.fixture
def model_path(tmp_path):
    path = tiny.save(tiny.build(), tmp_path / "model")
    tiny.tokenizer().save(str(path.parent / "tokenizer.json"))
    return path


def inputs() -> ModelInputs:
    return ModelInputs.from_model(ir.from_proto(tiny.build()))


class Once:
    """A reader with get_next alone."""

    def __init__(self, feeds: list):
        self.feeds = iter(feeds)

    def get_next(self):
        return next(self.feeds, None)


def test_token_reader_follows_the_protocol():
    reader = TokenReader(inputs(), np.arange(6).reshape(2, 3))
    assert isinstance(reader, CalibrationDataReader)
    assert len(reader) == 2
    np.testing.assert_array_equal(reader.get_next()["input_ids"], [[0, 1, 2]])
    assert reader.get_next() is not None
    assert reader.get_next() is None
    reader.rewind()
    np.testing.assert_array_equal(reader.get_next()["input_ids"], [[0, 1, 2]])
    assert len(list(reader)) == len(list(reader)) == 2


def test_token_reader_refuses_what_does_not_fit():
    with pytest.raises(CalibrationError, match="token id 99"):
        TokenReader(inputs(), np.array([[99]]))
    with pytest.raises(CalibrationError, match=r"\[samples, sequence\]"):
        TokenReader(inputs(), np.arange(3))


def test_text_reader(model_path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in range(2, 12)))
    reader = TextReader(model_path, text, samples=2, seq_len=4, bos=1, spread=False)
    np.testing.assert_array_equal(reader.token_windows, [[1, 2, 3, 4], [1, 5, 6, 7]])
    reader = TextReader(model_path, text, model_path.parent, samples=1, seq_len=4, bos=Bos.NONE)
    np.testing.assert_array_equal(reader.get_next()["input_ids"], [[2, 3, 4, 5]])
    assert len(TextReader(model_path, samples=3, seq_len=5)) == 3


def test_a_text_reader_knows_its_tokenizer_from_elsewhere(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(model_path.parent)
    reader = TextReader(model_path.name, samples=1, seq_len=8)
    monkeypatch.chdir(tmp_path)
    assert reader.tokenizer_path.is_file()


@pytest.mark.parametrize("number", [-1, 1.5, "3", True, None])
def test_numbers_of_a_text_reader_are_whole(model_path, number):
    with pytest.raises(CalibrationError, match=rf"samples={number!r}: need a whole number"):
        TextReader(model_path, samples=number)
    if number is not None:
        with pytest.raises(CalibrationError, match=rf"seq_len={number!r}: need a whole number"):
            TextReader(model_path, seq_len=number)
    with pytest.raises(CalibrationError, match=rf"{10**30} windows of 4 need .* give more text"):
        TextReader(model_path, samples=10**30, seq_len=4)


def test_npz_stacked(tmp_path):
    np.savez(tmp_path / "a.npz", input_ids=np.arange(6).reshape(2, 3))
    plain, completed = NpzReader(tmp_path / "a.npz"), NpzReader(tmp_path / "a.npz", inputs())
    assert len(plain) == 2
    assert [set(feeds) for feeds in plain] == [{"input_ids"}] * 2
    np.testing.assert_array_equal(list(plain)[1]["input_ids"], [[3, 4, 5]])
    assert "past_key_values.0.key" in completed.get_next()


def test_npz_folder(tmp_path):
    for number in (2, 1):
        np.savez(tmp_path / f"{number}.npz", x=np.full((3, number), number))
    assert [feeds["x"].shape for feeds in NpzReader(tmp_path)] == [(3, 1), (3, 2)]


def test_npz_errors(tmp_path):
    with pytest.raises(CalibrationError, match="no calibration data"):
        NpzReader(tmp_path / "absent.npz")
    with pytest.raises(CalibrationError, match=r"no .npz file"):
        NpzReader(tmp_path)
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match=r"no .npz archive"):
        NpzReader(tmp_path / "bad.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(CalibrationError, match=r"no .npz archive"):
        NpzReader(tmp_path / "one.npy")
    np.savez(tmp_path / "uneven.npz", a=np.zeros((2, 1)), b=np.zeros((3, 1)))
    with pytest.raises(CalibrationError, match="first axis"):
        NpzReader(tmp_path / "uneven.npz")


def test_a_wrapped_reader_without_rewind_is_read_once():
    reader = wrap(Once([{"x": np.zeros(1)}]))
    assert len(list(reader)) == 1
    with pytest.raises(CalibrationError, match="Once has no rewind"):
        list(reader)


def test_a_wrapped_reader_with_rewind_starts_over():
    class Twice(Once):
        def rewind(self):
            self.feeds = iter([{"x": np.ones(1)}])

    reader = wrap(Twice([{"x": np.zeros(1)}]))
    assert len(list(reader)) == len(list(reader)) == 1


def test_the_record_is_of_readers_of_ours(model_path):
    class Theirs:
        def __init__(self):
            self.record = {"of": object()}  # something else, which no report could hold
            self.samples = iter([{"input_ids": np.ones((1, 2), np.int64)}])

        def get_next(self):
            return next(self.samples, None)

    theirs, ours = wrap(Theirs()), wrap(TextReader(model_path, samples=2, seq_len=8))
    assert ours.record == {}, "it was not read yet"
    assert len(list(theirs)) == 1
    assert len(list(ours)) == 2
    assert theirs.record == {}
    assert ours.record == {"calibration": {"text": None, "windows": 2, "spread": True, "more": 0, "seq_len": 8}}


def test_wrap_refuses_what_is_no_reader():
    with pytest.raises(CalibrationError, match="list is no calibration reader"):
        wrap([])
    with pytest.raises(CalibrationError, match="returned int"):
        wrap(Once([3])).get_next()


def test_importing_readers_imports_no_onnxruntime():
    code = "import sys, quarot_onnx.calibration.readers; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
