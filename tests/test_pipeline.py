"""The pipeline: what it writes computes what it should, records what it did, and leaves nothing else behind."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import exports
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exports import VOCAB

from quarot_onnx import pipeline
from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.config.spec import Int8Spec, QLayerConfig, UInt8Spec
from quarot_onnx.errors import ConfigError, ModelError, OutputError, VerificationError
from quarot_onnx.evaluation import equivalence
from quarot_onnx.graph.linear import linears
from quarot_onnx.graph.query import FLOAT_TYPES
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import RECIPE_KEY, Outcome, quantize, recorded, rotate
from quarot_onnx.rotation.plan import Plan
from quarot_onnx.rotation_config.config_file import write_config
from quarot_onnx.sites.detect import detect

W8 = QLayerConfig(weight=Int8Spec(quant_granularity="Channel"))
EXACT = UInt8Spec(symmetric=True, quant_granularity="Channel")
PER_TOKEN = QLayerConfig(UInt8Spec(symmetric=True, quant_granularity="Token"), EXACT)
STATIC = QLayerConfig(UInt8Spec(), EXACT)
EXPORTS: dict[str, Callable[[], Path]] = {
    "optimum": lambda: exports.optimum_export("llama"),
    "optimum tied": lambda: exports.optimum_export("llama", tied=True),
    "dynamo": lambda: exports.dynamo_export("llama"),
    "genai": exports.genai_like,
    "genai float16": lambda: exports.genai_like(dtype="fp16"),
    "opset23": exports.opset23_module_export,
}


@pytest.mark.parametrize("layer", [W8, PER_TOKEN], ids=["w8", "per-token"])
@pytest.mark.parametrize("export", EXPORTS)
def test_rotated_int8_stays_close_to_float(export: str, layer: QLayerConfig, tmp_path: Path) -> None:
    """With the embedding in int8 too; tied tables come apart."""
    source = EXPORTS[export]()
    config = QConfig(layer, algo_config=[QuarotConfig()], OpTypesToQuantize=["MatMul", "Gemm", "Gather"])
    done = quantize(source, tmp_path / "q.onnx", config)
    assert done.equivalence is not None
    assert done.equivalence.passed
    assert done.recipe["quantization"]["embeddings"] == 1  # type: ignore[index]
    # 8 bits on weights and rows: errors of some 0.5 % per Linear that add up like noise over two layers.
    noise = equivalence.compare(source, tmp_path / "q.onnx", real_tokens=64, random_tokens=64)
    assert 1e-4 < noise.rel_l2 < 0.1
    written = model_io.load(tmp_path / "q.onnx")
    tensors = [value.const_value for value in written.graph.initializers.values() if value.const_value is not None]
    large = [t.name for t in tensors if t.dtype in FLOAT_TYPES and len(t.shape) == 2 and t.size >= VOCAB * 48]
    assert not large, "no float copy of a table or head stays behind"


def test_two_steps_are_one(tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    one = quantize(source, tmp_path / "one.onnx", QConfig(PER_TOKEN, algo_config=[QuarotConfig()]))
    rotate(source, tmp_path / "r.onnx", QuarotConfig())
    two = quantize(tmp_path / "r.onnx", tmp_path / "two.onnx", QConfig(PER_TOKEN))
    assert one.recipe["rotation"] == two.recipe["rotation"]
    a, b = (onnx.load(tmp_path / name).graph for name in ("one.onnx", "two.onnx"))
    assert [t.raw_data for t in a.initializer] == [t.raw_data for t in b.initializer]
    assert [(n.op_type, n.input) for n in a.node] == [(n.op_type, n.input) for n in b.node]


def test_the_recipe_is_in_the_model_and_beside_it(tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    config = QConfig(W8, algo_config=[QuarotConfig(use_random_had=True, seed=11)])
    done = quantize(source, tmp_path / "q.onnx", config)
    inside = json.loads(model_io.load(tmp_path / "q.onnx").metadata_props[RECIPE_KEY])
    beside = json.loads((tmp_path / "q.quarot.json").read_text())
    ours = {"equivalence", "check", "beside"}
    assert inside == done.recipe == {key: value for key, value in beside.items() if key not in ours}
    assert beside["beside"]["model"] == "q.onnx"
    assert set(beside["beside"]["companions"]) >= {"config.json", "tokenizer.json"}
    assert beside["equivalence"]["passed"]
    assert inside["version"]
    assert inside["rotation"]["rotations"]["R1"]["seed"] == 11
    assert QConfig.from_dict(inside["quantization"]["config"]) == config
    assert recorded(model_io.load(tmp_path / "q.onnx")) == inside
    assert recorded(model_io.load(source)) is None


def test_a_damaged_recipe_is_told() -> None:
    model = model_io.load(exports.optimum_export("llama"))
    for text in ("{", "[]"):
        model.metadata_props[RECIPE_KEY] = text
        with pytest.raises(ModelError, match=RECIPE_KEY):
            recorded(model)


def test_schemes_choose_their_rotations(tmp_path: Path) -> None:
    source = exports.optimum_export("llama")

    def counts(layer: QLayerConfig, quarot: QuarotConfig) -> set[str]:
        done = quantize(source, tmp_path / "q.onnx", QConfig(layer, algo_config=[quarot]), verify=False)
        return set(done.recipe["rotation"]["counts"])  # type: ignore[index]

    assert counts(W8, QuarotConfig()) == {"R1", "R2"}
    assert counts(PER_TOKEN, QuarotConfig()) == {"R1", "R2", "R4"}
    assert counts(PER_TOKEN, QuarotConfig(r4=False, r3=True)) == {"R1", "R2", "R3"}
    with pytest.raises(ConfigError, match="no rotation is left"):
        counts(W8, QuarotConfig(r1=False, r2=False))


@pytest.mark.parametrize("command", ["rotate", "quantize"])
def test_a_failed_proof_writes_nothing(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation that forgets one factor is found."""
    from quarot_onnx.run import turning  # noqa: PLC0415

    apply = turning.apply_plan

    def forgetful(model: ir.Model, plan: Plan, shapes: Shapes) -> None:
        apply(model, plan, shapes)
        weight = next(linears(model.graph)).weight
        array = model_io.read_array(weight.tensor) * np.float32(1.01)
        weight.value.const_value = ir.Tensor(array, name=weight.value.name)

    monkeypatch.setattr(turning, "apply_plan", forgetful)
    source, out = exports.optimum_export("llama"), tmp_path / "new" / "out.onnx"
    runs = {
        "rotate": lambda: rotate(source, out, QuarotConfig()),
        "quantize": lambda: quantize(source, out, QConfig(W8, algo_config=[QuarotConfig()])),
    }
    with pytest.raises(VerificationError, match="differ"):
        runs[command]()
    assert not list(tmp_path.iterdir())


def test_existing_outputs_are_kept_where_asked(tmp_path: Path) -> None:
    source = exports.optimum_export("llama")
    (tmp_path / "q.onnx").write_text("mine")
    for run in (
        lambda: quantize(source, tmp_path / "q.onnx", QConfig(W8), overwrite=False),
        lambda: rotate(source, tmp_path / "q.onnx", QuarotConfig(), overwrite=False),
    ):
        with pytest.raises(OutputError, match="overwriting is off"):
            run()
    assert (tmp_path / "q.onnx").read_text() == "mine"


def test_progress_and_times_follow_the_phases(tmp_path: Path) -> None:
    source, seen = exports.optimum_export("llama"), []
    reader = TextReader(source, samples=2, seq_len=16)
    config = QConfig(STATIC, algo_config=[QuarotConfig()])
    done: Outcome = quantize(source, tmp_path / "q.onnx", config, reader, progress=lambda phase, *_: seen.append(phase))
    assert list(dict.fromkeys(seen)) == ["rotate", "verify", "calibrate", "quantize", "save", "check"]
    assert {"rotate", "verify", "calibrate", "quantize", "save", "check"} <= done.seconds.keys()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_calib_data_size_limits_the_samples(tmp_path: Path) -> None:
    source, seen = exports.optimum_export("llama"), []
    config = QConfig(STATIC, CalibDataSize=2)
    reader = TextReader(source, samples=5, seq_len=16)
    quantize(source, tmp_path / "q.onnx", config, reader, progress=lambda *step: seen.append(step))
    assert [step for step in seen if step[0] == "calibrate"] == [("calibrate", 1, 2), ("calibrate", 2, 2)]


def test_r3_of_a_rotation_config_is_noted(llama_optimum: Path, tmp_path: Path) -> None:
    path = tmp_path / "rotation_config.json"
    write_config(detect(model_io.load(llama_optimum)), path)
    done = rotate(llama_optimum, tmp_path / "a" / "model.onnx", QuarotConfig(r_config_path=path), verify=False)
    assert any("R3 is done because" in note for note in done.notes)
    without = rotate(
        llama_optimum, tmp_path / "b" / "model.onnx", QuarotConfig(r_config_path=path, r3=False), verify=False
    )
    assert not without.notes
    assert "R3" not in without.recipe["rotation"]["counts"]


def test_what_fails_in_the_proof_is_no_fault_of_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/states")

    monkeypatch.setattr(pipeline, "prove", full)
    target = tmp_path / "out" / "model.onnx"
    told = r"the check of .*model.onnx failed at /tmp/states: No space left on device"
    with pytest.raises(OutputError, match=told):
        rotate(exports.optimum_export("llama"), target, QuarotConfig())
    assert not target.parent.exists()
