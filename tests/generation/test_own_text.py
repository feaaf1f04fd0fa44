"""Text that a model writes to be calibrated on: drawn from what the model says, whatever its graph's spelling."""

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from exports import BOS, EOS, EXPORTS, VOCAB, dynamo_export, genai_like, optimum_export

from quarot_onnx.calibration.bos import Bos
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.errors import CalibrationError
from quarot_onnx.evaluation.decoder import Decoder
from quarot_onnx.generation import own_text
from quarot_onnx.generation.own_text import own_windows, why_not
from quarot_onnx.io import model_io
from quarot_onnx.sessions import runtime


def reason(path: Path) -> str:
    model = model_io.load(path)
    return why_not(model, path.parent, ModelInputs.from_model(model, folder=path.parent))


WRITERS = [name for name in EXPORTS if name.startswith(("optimum", "genai", "dynamo cache"))]


@pytest.mark.parametrize("export", WRITERS)
def test_each_token_is_what_the_model_says_of_those_before(export: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = EXPORTS[export]()
    monkeypatch.setattr(own_text, "_drawn", lambda logits, _rng: logits.argmax(axis=1))
    monkeypatch.setattr(own_text, "_STRETCH", 6)
    found = own_windows(path, 3, 12)
    assert found.shape == (3, 12)
    assert (found[:, 0] == BOS).all()
    assert np.isin(found[:, 1:], range(BOS)).all()  # neither BOS nor EOS, nor what the tokenizer does not know
    inputs = ModelInputs.from_path(path)
    session = runtime.session(path)
    # Two stretches of a window: 6 tokens and 5.
    for stretch in (found[:, 1:7], found[:, 7:]):
        ids = np.concatenate([np.full((3, 1), BOS), stretch], axis=1)
        (logits,) = session.run([inputs.logits], inputs.feed(ids))
        rows = logits[:, 1:-1, :BOS].astype(np.float64)
        chosen = np.take_along_axis(rows, stretch[:, 1:, None], axis=2)[..., 0]
        tolerance = 2e-2 if "16" in export else 1e-4
        assert (rows.max(axis=2) - chosen).max() <= tolerance * np.abs(rows).max()


@pytest.mark.parametrize("block", [256, 7])
def test_what_is_drawn_is_as_likely_as_the_logits_say(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "_BLOCK", block)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(300) * 2
    logits[[3, 299]] = -np.inf
    chances = np.exp(logits) / np.exp(logits).sum()
    count = 40_000
    drawn = own_text._drawn(np.tile(logits, (count, 1)), rng)
    seen = np.bincount(drawn, minlength=300) / count
    assert seen[3] == seen[299] == 0
    # Five standard deviations of a frequency.
    assert (np.abs(seen - chances) <= 5 * np.sqrt(chances / count) + 1e-12).all()


def test_rounding_at_the_end_draws_the_last() -> None:
    assert own_text._reached(np.array([0.25, 0.5, 0.25]), 1.0 + 1e-9)[0] == 2
    assert own_text._reached(np.array([0.25, 0.5, 0.25]), 0.25) == (1, 0.0)


@pytest.mark.parametrize("caches", [1, 1 << 28])
def test_a_seed_gives_one_text(caches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = genai_like(tied_transposed=False)
    monkeypatch.setattr(own_text, "_CACHES", caches)
    monkeypatch.setattr(own_text, "_OF_WEIGHTS", 1 << 40)
    steps = list[tuple[int, int | None]]()
    one = own_windows(path, 3, 9, seed=1, progress=lambda *told: steps.append(told))
    assert steps[-1] == (24, 24)
    assert sorted(steps) == steps
    np.testing.assert_array_equal(own_windows(path, 3, 9, seed=1), one)
    assert (own_windows(path, 3, 9, seed=2) != one).any()
    assert len({tuple(row) for row in one.tolist()}) == 3


def test_bos_is_as_it_is_asked_for() -> None:
    path = optimum_export("llama")
    assert own_windows(path, 2, 5, bos=Bos.NONE).max() < BOS
    assert (own_windows(path, 2, 5, bos=EOS)[:, 0] == EOS).all()


@pytest.mark.parametrize(("windows", "length"), [(0, 8), (2, 1)])
def test_no_room_is_refused(windows: int, length: int) -> None:
    with pytest.raises(CalibrationError, match="hold no text"):
        own_windows(genai_like(tied_transposed=False), windows, length)


def test_rows_together_are_rows_alone() -> None:
    path = optimum_export("llama")
    decoder, rng = Decoder(path), np.random.default_rng(0)
    parts = [rng.integers(0, VOCAB, (3, length)) for length in (5, 1, 2)]
    together = [decoder.feed_rows(part) for part in parts]
    for row in range(3):
        decoder.start()
        for part, logits in zip(parts, together, strict=True):
            np.testing.assert_allclose(decoder.feed(part[row].tolist()), logits[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EXPORTS)
def test_who_can_write_is_known(name: str) -> None:
    assert ("no cache" in reason(EXPORTS[name]())) == (name not in WRITERS)


def test_who_cannot_write_is_told() -> None:
    with pytest.raises(CalibrationError, match=r"cannot write text to be calibrated on, as it has no cache"):
        own_windows(dynamo_export("llama"), 2, 8)


def test_a_tokenizer_of_special_tokens_alone_is_refused(tmp_path: Path) -> None:
    path = copied(genai_like(tied_transposed=False), tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    for token, number in content["model"]["vocab"].items():
        content["added_tokens"].append(
            {"id": number, "content": token, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        )
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match="has no token that text is made of"):
        own_windows(path, 2, 8)


def copied(source: Path, folder: Path) -> Path:
    for file in source.parent.iterdir():
        shutil.copy(file, folder / file.name)
    return folder / source.name


def test_windows_come_behind_those_of_a_text() -> None:
    path = genai_like(tied_transposed=False)
    more: npt.NDArray[np.int64] = np.full((2, 8), 7)
    reader = TextReader(path, samples=3, seq_len=8, more=lambda _: more)
    alone = TextReader(path, samples=3, seq_len=8)
    np.testing.assert_array_equal(reader.token_windows, np.concatenate([alone.token_windows, more]))
    np.testing.assert_array_equal(reader.rest, alone.rest)
    assert (reader.of_text, TextReader(path, samples=0, seq_len=8, more=lambda _: more).of_text) == (3, 0)
    for text in (None, Path(__file__)):
        np.testing.assert_array_equal(
            TextReader(path, text, samples=0, seq_len=8, more=lambda _: more).token_windows, more
        )
    with pytest.raises(CalibrationError, match="more windows are"):
        TextReader(path, samples=3, seq_len=9, more=lambda _: more)
