"""How near a quantized model comes to its original: figures by hand, limits, and what is no prediction."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import exports
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny_decoders as tiny
from onnx import numpy_helper

from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.errors import CalibrationError, ModelError, VerificationError
from quarot_onnx.evaluation import fidelity
from quarot_onnx.evaluation.check import Check, material_for, prepare
from quarot_onnx.evaluation.fidelity import NO_LIMITS, Fidelity, Limits, measure, reference, require
from quarot_onnx.evaluation.material import DECODE_STEPS, Material
from quarot_onnx.evaluation.report import fidelity_record
from quarot_onnx.io import model_io
from quarot_onnx.sessions import runtime


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny decoder with a cache, and one whose head is 5 % larger."""
    arrays = tiny.weights()
    first = tiny.save(tiny.build(tiny.Spec()), tmp_path / "a")
    second = tiny.save(tiny.build(tiny.Spec(), {**arrays, "Wh": arrays["Wh"] * np.float32(1.05)}), tmp_path / "b")
    return first, second


def material(path: Path, windows: int = 3, length: int = 12, **more: object) -> Material:
    inputs = ModelInputs.from_path(path)
    ids = np.random.default_rng(0).integers(2, tiny.VOCAB, (windows, length))
    return Material(inputs, ids, "test", DECODE_STEPS, **more)  # type: ignore[arg-type]


def compared(first: Path, second: Path, given: Material, limits: Limits = NO_LIMITS) -> Fidelity:
    with reference(first, given) as original:
        return measure(original, second, limits=limits)


def logits(path: Path, ids: np.ndarray) -> np.ndarray:
    """Of a whole window in one prefill, float64."""
    inputs = ModelInputs.from_path(path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.stack([session.run([inputs.logits], inputs.feed(row[None]))[0][0] for row in ids]).astype(np.float64)


def test_the_figures_by_hand(pair: tuple[Path, Path]) -> None:
    given = material(pair[0])
    found = compared(*pair, given)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits(path, given.ids) for path in pair))
    kl = (p * np.log(p / q)).sum(-1)
    assert found.kl == pytest.approx(kl.mean(), rel=1e-3)
    assert found.decode_kl == pytest.approx(kl[:, -4:].mean(), rel=1e-3)
    assert found.top1_agreement == (p.argmax(-1) == q.argmax(-1)).mean()
    targets = given.ids[:, 1:, None]
    a, b = (np.exp(-np.log(np.take_along_axis(x[:, :-1], targets, 2)).mean()) for x in (p, q))
    assert found.perplexity_a == pytest.approx(a, rel=1e-5)
    assert found.perplexity_b == pytest.approx(b, rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(b / a, rel=1e-5)
    assert found.exact_perplexity == found.perplexity_b
    assert (found.tokens, found.decode_steps, found.saturating) == (36, 12, 0)


def test_a_model_beside_itself(pair: tuple[Path, Path]) -> None:
    found = compared(pair[0], pair[0], material(pair[0]))
    assert (found.kl, found.top1_agreement, found.perplexity_ratio) == (
        pytest.approx(0, abs=1e-6),
        1,
        pytest.approx(1, rel=1e-6),
    )


def test_tokens_that_never_come_count_for_nothing(pair: tuple[Path, Path]) -> None:
    given = material(pair[0])
    given = replace(given, ids=given.ids % (tiny.VOCAB - 2))  # none of them is in the text
    low, infinite = (
        compared(*(tiny.masked(shutil.copy(path, path.with_name(name)), never) for path in pair), given)
        for name, never in (("low.onnx", -1e9), ("infinite.onnx", -np.inf))
    )
    assert infinite.kl == low.kl > 0
    assert (infinite.perplexity_a, infinite.perplexity_b) == (low.perplexity_a, low.perplexity_b)
    assert infinite.top1_agreement == low.top1_agreement


def test_limits(pair: tuple[Path, Path]) -> None:
    given = material(pair[0])
    found = compared(*pair, given)
    assert found.passed
    require(found)
    assert found.perplexity_ratio is not None
    for limits, word in (
        (Limits(max_kl=found.kl * 0.99), "KL"),
        (Limits(max_ppl_ratio=found.perplexity_ratio * 0.99), "perplexity ratio"),
    ):
        broken = compared(*pair, given, limits)
        assert not broken.passed
        with pytest.raises(VerificationError, match=f"{word}.*allowed"):
            require(broken)
    assert compared(*pair, given, Limits(found.kl * 1.01, found.perplexity_ratio * 1.01)).passed


def test_random_ids_have_no_perplexity(pair: tuple[Path, Path]) -> None:
    found = compared(*pair, material(pair[0], is_text=False))
    assert found.perplexity_ratio is None
    assert found.exact_perplexity_ratio is None
    assert found.kl > 0
    json.dumps(fidelity_record(found), allow_nan=False)


def test_not_a_number_is_no_prediction(pair: tuple[Path, Path], tmp_path: Path) -> None:
    arrays = tiny.weights()
    broken = arrays["Wh"].copy()
    broken[0, 0] = np.nan
    third = tiny.save(tiny.build(tiny.Spec(), {**arrays, "Wh": broken}), tmp_path / "c")
    with pytest.raises(VerificationError, match="NaN"):
        compared(pair[0], third, material(pair[0]))
    with pytest.raises(ModelError, match="on its own"):
        compared(third, pair[0], material(pair[0]))


def test_exact_products_are_a_figure_of_their_own(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products saturate, the model runs once more; here nothing does, so the figures agree."""
    monkeypatch.setattr(fidelity, "saturating_here", lambda _model: 2)
    found = compared(*pair, material(pair[0]), Limits(max_ppl_ratio=0.1))
    assert found.saturating == 2
    assert found.exact_perplexity == pytest.approx(found.perplexity_b, rel=1e-6)
    with pytest.raises(VerificationError, match=r"exact products.*int8 weights saturate"):
        require(found)


@pytest.mark.parametrize(("spread", "used"), [(False, 4 * 65), (True, 64)])
def test_what_was_calibrated_on_is_not_checked_on(tmp_path: Path, spread: bool, used: int) -> None:
    source = exports.optimum_export("llama")
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + n % 26) for n in range(3000)))
    reader = TextReader(source, text, samples=4, seq_len=65, spread=spread)
    given = material_for(Check(tokens=256, text=None), source, model_io.load(source), calibrated=reader)
    assert str(text) in given.origin
    whole = TextReader(source, text, samples=1, seq_len=2900).token_windows[0]
    whole = whole[1:] if reader.bos_id is not None else whole
    front = given.ids[0, 1:] if reader.bos_id is not None else given.ids[0]
    np.testing.assert_array_equal(front, whole[used : used + front.size])


def test_a_text_that_calibration_uses_up_gives_way_to_the_documentation(tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    (tmp_path / "text.txt").write_text("abcdefgh" * 40)
    reader = TextReader(source, tmp_path / "text.txt", samples=2, seq_len=65)
    assert material_for(Check(), source, model_io.load(source), calibrated=reader).origin == "Python's documentation"
    greedy = TextReader(source, samples=1, seq_len=9)
    greedy.rest = greedy.rest[:10]
    with pytest.raises(CalibrationError, match=r"10 tokens.*--no-check"):
        material_for(Check(), source, model_io.load(source), calibrated=greedy)


def test_what_cannot_be_checked_is_a_note_unless_it_was_demanded(tmp_path: Path) -> None:
    bare = tmp_path / "model.onnx"
    model_io.save(model_io.load(exports.optimum_export("llama")), bare)
    model = model_io.load(bare)
    by_ids = prepare(Check(), bare, model, None)
    assert by_ids.material is not None
    assert by_ids.material.origin == "random ids"
    with pytest.raises(CalibrationError, match=r"tokenizer\.json.*--tokenizer"):
        prepare(Check(limits=Limits(max_ppl_ratio=2)), bare, model, None)
    assert prepare(None, bare, model, None).run(bare, model) == {}


def test_a_damaged_scale_shows(tmp_path: Path) -> None:
    """One weight's scales times 1.5, as a faulty writer would leave them."""
    from quarot_onnx.config import QConfig  # noqa: PLC0415
    from quarot_onnx.config.spec import QLayerConfig, UInt8Spec  # noqa: PLC0415
    from quarot_onnx.pipeline import quantize  # noqa: PLC0415

    source = exports.optimum_export("llama")
    token = UInt8Spec(symmetric=True, quant_granularity="Token")
    weight = UInt8Spec(symmetric=True, quant_granularity="Channel")
    done = quantize(source, tmp_path / "q.onnx", QConfig(QLayerConfig(token, weight)))
    assert done.fidelity is not None
    assert done.fidelity.saturating == 0
    report = json.loads((tmp_path / "q.quarot.json").read_text())
    assert report["check"]["kl"] == done.fidelity.kl
    made = onnx.load(tmp_path / "q.onnx")
    tensor = next(t for t in made.graph.initializer if t.name.endswith("_scale") and len(t.dims) == 1)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.5), tensor.name))
    onnx.save(made, tmp_path / "damaged.onnx")
    given = material_for(Check(), source, model_io.load(source))
    assert compared(source, tmp_path / "damaged.onnx", given).kl > 3 * compared(source, tmp_path / "q.onnx", given).kl


def test_a_rotated_run_opens_the_original_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof's session also gives the check its logits: the same figures as from a session of its own."""
    from quarot_onnx.config import QConfig  # noqa: PLC0415
    from quarot_onnx.config.algorithm import QuarotConfig  # noqa: PLC0415
    from quarot_onnx.config.spec import QLayerConfig, UInt8Spec  # noqa: PLC0415
    from quarot_onnx.piecewise import runs  # noqa: PLC0415
    from quarot_onnx.pipeline import quantize  # noqa: PLC0415

    source, opened = exports.optimum_export("llama"), []
    real = runtime.session

    def counted(path: str | Path, **options: object) -> object:
        opened.append(Path(path))
        return real(path, **options)  # type: ignore[arg-type]

    augmented = runs.open_augmented

    def counted_model(model: ir.Model, **options: object) -> object:
        opened.append(model_io.source_of(model))
        return augmented(model, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(runtime, "session", counted)
    monkeypatch.setattr(runs, "open_augmented", counted_model)
    config = QConfig(
        QLayerConfig(
            UInt8Spec(symmetric=True, quant_granularity="Token"),
            UInt8Spec(symmetric=True, quant_granularity="Channel"),
        ),
        algo_config=[QuarotConfig()],
    )
    proved = quantize(source, tmp_path / "a" / "q.onnx", config)
    assert opened.count(source) == 1
    opened.clear()
    alone = quantize(source, tmp_path / "b" / "q.onnx", config, verify=False)
    assert opened.count(source) == 1
    assert proved.fidelity is not None
    assert alone.fidelity is not None
    assert proved.fidelity.kl == pytest.approx(alone.fidelity.kl, rel=1e-3)
    assert proved.fidelity.perplexity_a == pytest.approx(alone.fidelity.perplexity_a, rel=1e-6)
