"""The demo: SmolLM2-135M from its GGUF file to rotated, quantized ONNX models, and what each costs and saves.

Perplexities are taken on Python's own documentation (``pydoc_data.topics``), which every Python carries: its first
part calibrates, its last part, written to ``evaluation.txt``, is evaluated. The absolute value says little (the
reference manual is no prose); the ratios to float are what the table is for.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.calibration.text import default_text
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import AlgoConfig, KVCacheConfig, QronosConfig, QuarotConfig, SinkPrefixConfig
from quarot_onnx.config.choices import PrefixForm
from quarot_onnx.config.enums import QuantGranularity
from quarot_onnx.config.spec import Int4Spec, Int8Spec, QLayerConfig, UInt8Spec
from quarot_onnx.errors import OutputError
from quarot_onnx.evaluation.perplexity import Perplexity, perplexity, prefill_speed
from quarot_onnx.evaluation.report import perplexity_record
from quarot_onnx.export.export import export, packaged_model
from quarot_onnx.io.model_io import load
from quarot_onnx.pipeline import quantize
from quarot_onnx.processor import described
from quarot_onnx.progress import PhaseProgress
from quarot_onnx.sites.detect import detect

SEQ_LEN = 512
_UNSCORED = 2
CALIBRATION_SAMPLES = 16
_EVALUATION_SHARE = 0.3
_RESULTS, _TEXTS = "results.json", ("calibration.txt", "evaluation.txt")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: What the table says.
        folder: Where its model goes.
        config: How it is made, given the names of the head's nodes; None for the float model itself.
    """

    name: str
    folder: str
    config: Callable[[list[str]], QConfig] | None


_EIGHT = UInt8Spec(symmetric=True, quant_granularity=QuantGranularity.Channel)
"""8-bit weights whose products are exact on every processor."""


def _w8(*, rotated: bool) -> Callable[[list[str]], QConfig]:
    layer = QLayerConfig(weight=Int8Spec())
    return lambda head: QConfig(layer, exclude=head, algo_config=[QuarotConfig()] if rotated else [])


def _static(*algorithms: AlgoConfig) -> Callable[[list[str]], QConfig]:
    layer = QLayerConfig(activation=UInt8Spec(), weight=_EIGHT)
    return lambda head: QConfig(layer, exclude=head, algo_config=algorithms)


_TOKEN = UInt8Spec(symmetric=True, quant_granularity=QuantGranularity.Token)
_W8A8 = QLayerConfig(activation=_TOKEN, weight=_EIGHT)


def _per_token(_head: list[str]) -> QConfig:
    return QConfig(_W8A8, algo_config=[QuarotConfig()])


def _per_token_and_cache(_head: list[str]) -> QConfig:
    return QConfig(_W8A8, algo_config=[QuarotConfig(), KVCacheConfig(k_bits=8, v_bits=8)])


def _w4a8(head: list[str]) -> QConfig:
    layer = QLayerConfig(activation=_TOKEN, weight=Int4Spec())
    return QConfig(layer, specific_layer_config={_W8A8: head}, algo_config=[QuarotConfig(), QronosConfig()])


_BEHIND_PREFIX = (QuarotConfig(), SinkPrefixConfig(form=PrefixForm.GRAPH))

VARIANTS = (
    Variant("float32", "float", None),
    Variant("W8", "w8", _w8(rotated=False)),
    Variant("W8, R1+R2", "w8-quarot", _w8(rotated=True)),
    Variant("W8A8 static", "w8a8-static", _static()),
    Variant("W8A8 static, R1+R2+R4", "w8a8-static-quarot", _static(QuarotConfig())),
    Variant("W8A8 static, R1+R2+R4, prefix", "w8a8-static-prefix", _static(*_BEHIND_PREFIX)),
    Variant("W8A8 token, R1+R2+R4", "w8a8-token-quarot", _per_token),
    Variant("W8A8 token, R1+R2+R3+R4, KV8", "w8a8-token-kv8", _per_token_and_cache),
    Variant("W4A8 token, R1+R2+R4, Qronos", "w4a8-token-quarot", _w4a8),
)


def run_demo(out: Path, *, windows: int = 8, say: Say | None = None) -> dict[str, object]:
    """Export, rotate, quantize and measure.

    Args:
        out: Folder for the models and results.json; what an earlier run wrote there is replaced.
        windows: Windows of 512 tokens per perplexity.
        say: Called with a line when a stage begins.

    Returns:
        The content of results.json, and ``out``.

    Raises:
        MissingPackageError: The packages of the extra ``demo`` or the packaged model are not installed.
        InputError: ``out`` cannot be written, or holds other files of the names that the demo gives.
    """
    tell = say or (lambda _line: None)
    out = Path(out).absolute()
    _refuse_other_files(out)
    tell("exporting SmolLM2-135M to ONNX (about a minute)")
    source = export(packaged_model(), out / "float", overwrite=True)
    calibration, evaluation = _texts(out)
    head = [linear.name for linear in detect(load(source)).head]
    rows: list[dict[str, object]] = []
    reference: float | None = None
    for variant in VARIANTS:
        tell(variant.name)
        model, seconds = source, 0.0
        if variant.config is not None:
            model = out / variant.folder / "model.onnx"
            config = variant.config(head)
            start = time.perf_counter()
            reader = TextReader(source, calibration, samples=CALIBRATION_SAMPLES, seq_len=SEQ_LEN)
            quantize(source, model, config, reader, check=None, progress=_quarters(tell))
            seconds = time.perf_counter() - start
        # The first token behind a prefix is not scored, so it is not of any row.
        result = perplexity(model, evaluation, source.parent, seq_len=SEQ_LEN, windows=windows, unscored=_UNSCORED)
        reference = result.perplexity if reference is None else reference
        rows.append(_row(variant.name, model, out=out, result=result, reference=reference, seconds=seconds))
    content: dict[str, object] = {
        "rows": rows,
        "processor": described(),
        "perplexity": {k: v for k, v in perplexity_record(result).items() if k not in ("perplexity", "nll", "seconds")}
        | {"text": str(evaluation.relative_to(out)), "tokenizer": str(Path("float") / "tokenizer.json")},
        "calibration": {"text": str(calibration.relative_to(out)), "samples": CALIBRATION_SAMPLES, "seq_len": SEQ_LEN},
        "repeat": "quarot-onnx evaluate MODEL --text evaluation.txt --tokenizer float "
        f"--windows {windows} --unscored {_UNSCORED}",
    }
    (out / _RESULTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content | {"out": str(out)}


def _quarters(tell: Say) -> PhaseProgress:
    """A line after each quarter of the weights that are rounded one after the other, which takes minutes."""

    def progress(phase: str, done: int, total: int | None) -> None:
        if phase == "round" and total and done * 4 // total > (done - 1) * 4 // total:
            tell(f"  {done} of {total} weights rounded")

    return progress


def _texts(out: Path) -> tuple[Path, Path]:
    """Write the calibration and the evaluation text; they do not overlap."""
    paths = out / _TEXTS[0], out / _TEXTS[1]
    for path, part in zip(paths, _parts(), strict=True):
        path.write_text(part, encoding="utf-8")
    return paths


def _parts() -> tuple[str, str]:
    """The text to calibrate on, and the text to evaluate on."""
    text = default_text()
    cut = text.index("\n", round(len(text) * (1 - _EVALUATION_SHARE))) + 1
    return text[:cut], text[cut:]


def _refuse_other_files(out: Path) -> None:
    """Refuse a folder that has files of the demo's names and was not made by a demo.

    Raises:
        OutputError: With their list.
    """
    names = (_RESULTS, *_TEXTS, *(variant.folder for variant in VARIANTS))
    found = [name for name in names if os.path.lexists(out / name)]
    if found and not _is_ours(out):
        raise OutputError(
            f"{out} was not made by a demo, which would replace {', '.join(found)} there; choose another with --out"
        )


def _is_ours(out: Path) -> bool:
    """Whether a folder has a demo's results.json, or the texts of one that was interrupted."""
    try:
        if not os.path.lexists(out / _RESULTS):
            return all(
                (out / name).read_text(encoding="utf-8") == part for name, part in zip(_TEXTS, _parts(), strict=True)
            )
        content = json.loads((out / _RESULTS).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= {"rows", "perplexity", "calibration", "repeat"}


def _row(
    name: str, model: Path, *, out: Path, result: Perplexity, reference: float, seconds: float
) -> dict[str, object]:
    """One row of results.json."""
    data = model.with_name(f"{model.name}.data")
    size = model.stat().st_size + (data.stat().st_size if data.exists() else 0)
    return {
        "name": name,
        "model": str(model.relative_to(out)),
        "perplexity": result.perplexity,
        "ratio": result.perplexity / reference,
        "size_mb": size / 1e6,
        "seconds": seconds,
        "prefill_tokens_per_s": prefill_speed(model),
    }
