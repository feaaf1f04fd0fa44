import numpy as np
import onnxruntime as ort
import pytest
import tiny_decoders as tiny

from quarot_onnx.calibration.text import Bos
from quarot_onnx.errors import CalibrationError, ModelError
from quarot_onnx.evaluation.perplexity import perplexity, prefill_speed


@pytest.fixture
def files(tmp_path):
    path = tiny.save(tiny.build(tiny.Spec(cache=False)), tmp_path)
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    ids = np.random.default_rng(0).integers(2, tiny.VOCAB, 50)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    return path, tmp_path / "text.txt", ids


def expected(path, window: np.ndarray) -> np.ndarray:
    """The negative log likelihood of each token of a window but the first, in plain NumPy."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    length = len(window)
    feeds = {"input_ids": window[None], "attention_mask": np.ones((1, length), np.int64)}
    feeds["position_ids"] = np.arange(length)[None]
    logits = session.run(["logits"], feeds)[0][0].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -np.log(p[np.arange(length - 1), window[1:]])


def test_it_is_the_exponential_of_the_mean(files):
    path, text, ids = files
    seen: list[tuple[int, int]] = []
    found = perplexity(path, text, path.parent, seq_len=8, windows=3, bos=1, progress=lambda *now: seen.append(now))
    nll = np.concatenate([expected(path, np.append(1, ids[7 * i : 7 * i + 7])) for i in range(3)])
    assert found.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-9)
    assert (found.tokens, found.windows, found.seq_len, found.bos_id) == (21, 3, 8, 1)
    assert found.tokenizer == path.parent / "tokenizer.json"
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_all_windows_without_bos(files):
    path, text, ids = files
    found = perplexity(path, text, path.parent, seq_len=8, windows=0, bos=Bos.NONE)
    nll = np.concatenate([expected(path, ids[8 * i : 8 * i + 8]) for i in range(6)])
    assert found.nll == pytest.approx(nll.mean(), rel=1e-9)
    assert (found.tokens, found.bos_id) == (42, None)


def test_too_little_text(files):
    path, text, _ = files
    with pytest.raises(CalibrationError, match="there are 50"):
        perplexity(path, text, path.parent, seq_len=8, windows=20)
    with pytest.raises(CalibrationError, match="score nothing"):
        perplexity(path, text, path.parent, seq_len=1)


def test_logits_that_are_not_finite(files):
    path, text, _ = files
    arrays = tiny.weights()
    arrays["Wh"][:] = np.inf
    tiny.save(tiny.build(tiny.Spec(cache=False), arrays), path.parent)
    with pytest.raises(ModelError, match="not finite in window 1"):
        perplexity(path, text, path.parent, seq_len=8, windows=1)


def test_prefill_speed_is_a_rate(files):
    assert prefill_speed(files[0], length=16, repeats=3) > 0
