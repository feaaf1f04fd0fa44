"""SmoothQuant: the float model computes the same, its activations are smoother, and what cannot be done is told."""

from collections.abc import Callable
from pathlib import Path

import exports
import hand_decoder
import numpy as np
import onnx
import onnxruntime
import pytest
from command_line import run
from lowbit_runs import text_reader
from onnx import TensorProto, helper
from rotating import check_equivalent, rotate

from quarot_onnx import (
    GPTQConfig,
    ModelQuantizer,
    QConfig,
    QLayerConfig,
    QuarotConfig,
    RTNConfig,
    SmoothQuantConfig,
    UInt8Spec,
)
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.peaks import collect_peaks
from quarot_onnx.calibration.readers import SampleReader
from quarot_onnx.config import Int4Spec, Int8Spec
from quarot_onnx.errors import ConfigError, InputError
from quarot_onnx.graph.linear import Linear, linears
from quarot_onnx.io import model_io
from quarot_onnx.pipeline import quantize
from quarot_onnx.quantization.select import Selection, select
from quarot_onnx.rotation.edits import Plan
from quarot_onnx.run.provenance import make_recipe, record, recorded
from quarot_onnx.run.smoothing import smooth_in_place
from quarot_onnx.sites.detect import Survey
from quarot_onnx.smoothing.places import find_places

O, D, G = exports.optimum_export, exports.dynamo_export, exports.genai_like  # noqa: E741

EXPORTS: dict[str, tuple[Callable[[], Path], int]] = {
    "optimum llama": (lambda: O("llama"), 9),
    "optimum tied": (lambda: O("llama", tied=True), 9),
    "optimum fp16": (lambda: O("llama", dtype="fp16"), 9),
    "optimum qwen2": (lambda: O("qwen2"), 9),
    "optimum phi3": (lambda: O("phi3"), 7),
    "optimum gemma3": (lambda: O("gemma3_text"), 4),
    "dynamo llama": (lambda: D("llama"), 9),
    "dynamo phi3": (lambda: D("phi3"), 9),
    "dynamo cache": (lambda: D("qwen2", with_cache=True), 9),
    "opset 23 operators": (exports.opset23_module_export, 9),
    "genai": (G, 9),
    "genai q, k, v bias": (lambda: G(packed_qkv=False, bias=True), 9),
    "genai packed bias": (lambda: G(bias=True), 9),
    "genai fp16": (lambda: G(dtype="fp16"), 9),
}
STATIC = QConfig(QLayerConfig(UInt8Spec(), Int8Spec()))


def samples(path: Path) -> SampleReader:
    """Two feeds of random tokens."""
    inputs = ModelInputs.from_path(path)
    rng = np.random.default_rng(0)
    length = inputs.lengths.seq or 24
    return SampleReader(
        [inputs.feed(rng.integers(5, min(200, inputs.id_range), (inputs.lengths.batch or 1, length))) for _ in range(2)]
    )


def smoothed(source: Path, folder: Path, alpha: float = 0.5) -> tuple[Path, Selection, Plan]:
    """Smooth ``source`` into ``folder``."""
    selection = select(Survey(model_io.load(source)), STATIC)
    config = SmoothQuantConfig(alpha)
    plan = smooth_in_place(source, selection, config, samples(source))
    model = selection.survey.model
    record(model, make_recipe(earlier=recorded(model), transform=(plan, config)))
    target = folder / "smoothed" / "model.onnx"
    model_io.save(model, target, companions_from=source.parent)
    return target, selection, plan


def found(path: Path) -> dict[str, Linear]:
    return {linear.name: linear for linear in linears(model_io.load(path).graph)}


def weight(linear: Linear) -> np.ndarray:
    array = model_io.read_array(linear.weight.tensor).astype(np.float64)
    return array.T if linear.weight.transposed else array


@pytest.mark.parametrize("rotates", [False, True], ids=["alone", "rotated"])
@pytest.mark.parametrize("case", EXPORTS)
def test_the_float_model_computes_the_same(case: str, rotates: bool, tmp_path: Path) -> None:
    make, places = EXPORTS[case]
    source = make()
    start = source
    if rotates:
        start, _, plan = rotate(source, tmp_path)
        model = model_io.load(start)
        record(model, make_recipe(rotation=(plan, QuarotConfig())))
        start = tmp_path / "recorded" / "model.onnx"
        model_io.save(model, start, companions_from=source.parent)
        places -= 0 if case == "optimum phi3" else plan.counts["R4"]  # its up's columns are computed from a shape
    target, _, plan = smoothed(start, tmp_path)
    assert plan.counts == {"places": places}
    check_equivalent(source, target)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_scales_are_those_of_the_paper(alpha: float, tmp_path: Path) -> None:
    """Equation 4, by hand, for a norm's readers: the inputs of each, and one scale for all of them."""
    source = O("llama")
    target, _, _ = smoothed(source, tmp_path, alpha)
    before, after = found(source), found(target)
    for kind in ("q_proj", "gate_proj"):
        names = [name for name in before if "layers.1/" in name and kind in name]
        group = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}[kind]
        (first,) = names
        readers = [name for name in before if "layers.1/" in name and any(word in name for word in group)]
        assert len(readers) == len(group)
        value = before[first].input.name or ""
        peaks = collect_peaks(source, [value], samples(source))[value]
        rows = np.max([np.abs(weight(before[name])).max(axis=1) for name in readers], axis=0)
        scale = peaks**alpha / rows ** (1 - alpha)
        scale /= np.exp(np.log(scale).mean())
        for name in readers:
            if "v_proj" in name or "up_proj" in name:
                continue  # their columns are scaled, too
            np.testing.assert_allclose(weight(after[name]), scale[:, None] * weight(before[name]), rtol=1e-6)
        value_after = after[first].input.name or ""
        np.testing.assert_allclose(
            collect_peaks(target, [value_after], samples(target))[value_after], peaks / scale, rtol=1e-4
        )


def test_an_outlier_channel_gets_smaller(tmp_path: Path) -> None:
    source = O("llama")
    model = model_io.load(source)
    survey = Survey(model)
    gamma = survey.sites.norms[1].norm.gamma
    assert gamma is not None
    array = model_io.read_array(gamma.tensor).copy()
    array[3] *= 200
    assert gamma.value is not None
    gamma.value.const_value = model_io.lazy_tensor(
        lambda: array, dtype=gamma.dtype, shape=array.shape, name=gamma.value.name
    )
    spiked = tmp_path / "spiked" / "model.onnx"
    model_io.save(model, spiked, companions_from=source.parent)
    target, _, _ = smoothed(spiked, tmp_path)

    def spread(path: Path) -> float:
        sites = Survey(model_io.load(path)).sites
        value = sites.norms[1].readers[0].input.name or ""
        peaks = collect_peaks(path, [value], samples(path))[value]
        return float(peaks.max() / np.median(peaks))

    assert spread(target) < spread(spiked) / 4


def test_only_linears_whose_inputs_are_quantized_count() -> None:
    survey = Survey(model_io.load(O("llama")))
    for config, places, reasons in (
        (QConfig(QLayerConfig(UInt8Spec(), Int8Spec()), exclude=["*down_proj*", "*o_proj*"]), 5, 0),
        (QConfig(QLayerConfig(weight=Int8Spec())), 0, 0),
    ):
        got, refused = find_places(survey.rotatable(), select(survey, config))
        assert (len(got), len(refused)) == (places, reasons)


@pytest.mark.parametrize("through", ["", "Identity", "Exp"])
@pytest.mark.parametrize("value", ["mlp0_up_out", "mlp0_active"])
def test_what_leaves_the_graph_is_not_scaled(value: str, through: str, tmp_path: Path) -> None:
    """An MLP's up projection, or its product with the gate, may be read from outside."""
    model = hand_decoder.build()
    if through:
        model.graph.node.append(helper.make_node(through, [value], ["copy"], name="copy"))
    model.graph.output.append(helper.make_tensor_value_info("copy" if through else value, TensorProto.FLOAT, None))
    source = tmp_path / "source" / "model.onnx"
    source.parent.mkdir()
    onnx.save(model, source)
    target, _, plan = smoothed(source, tmp_path)
    assert plan.counts == {"places": 4}  # of 5
    check_equivalent(source, target)
    assert any("mlp0_down" in note for note in plan.notes)


def test_down_behind_an_online_rotation_is_told_of(tmp_path: Path) -> None:
    rotated, _, _ = rotate(O("llama"), tmp_path)
    _, _, plan = smoothed(rotated, tmp_path)
    assert any("1 more, as the online rotation (R4) lies before it" in note for note in plan.notes)


def test_one_config_one_recipe_one_command_line_the_same_bytes(llama_optimum: Path, tmp_path: Path) -> None:
    common = ["--calib-own", "0", "--calib-samples", "4", "--calib-seq-len", "64", "--no-check", "--quiet"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "rotation: {r4: false}\nsmoothing: {alpha: 0.4}\nweights: {method: gptq, bits: 4}\nactivations: {bits: 8}\n"
    )
    typed = ["--w-bits", "4", "--weights", "gptq", "--a-bits", "8", "--no-r4", "--smooth-alpha", "0.4"]
    for name, options in (("file", ["--recipe", str(recipe)]), ("typed", typed)):
        assert run(["quantize", str(llama_optimum), str(tmp_path / name / "m.onnx"), *options, *common]) == 0
    layer = QLayerConfig(UInt8Spec(symmetric=True, quant_granularity="Token"), Int4Spec())
    head = next(linear.name for linear in Survey(model_io.load(llama_optimum)).sites.head)
    algorithms = [QuarotConfig(r4=False), SmoothQuantConfig(0.4), GPTQConfig()]
    quantizer = ModelQuantizer(QConfig(layer, exclude=[head], algo_config=algorithms))
    reader = text_reader(llama_optimum, 4, 64)
    quantizer.quantize_model(llama_optimum, tmp_path / "python" / "m.onnx", reader, check=None)
    data = [
        [path.read_bytes() for path in sorted((tmp_path / name).glob("m.onnx*"))]
        for name in ("file", "typed", "python")
    ]
    assert data[0]
    assert data[0] == data[1] == data[2]


def test_static_int8_after_smoothing_runs(llama_optimum: Path, tmp_path: Path) -> None:
    options = [
        "--scheme",
        "w8a8-static",
        "--no-r4",
        "--smooth-alpha",
        "0.4",
        "--calib-samples",
        "4",
        "--calib-seq-len",
        "64",
        "--quiet",
    ]
    assert run(["quantize", str(llama_optimum), str(tmp_path / "m.onnx"), *options, "--max-ppl-ratio", "1.1"]) == 0
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"global_config": QLayerConfig(weight=Int8Spec())},
            "smooth_quant: activations stay in float.*leave out Smooth",
        ),
        ({"algo_config": [GPTQConfig(), SmoothQuantConfig()]}, "rounding stands too early; rotate, then smooth"),
        ({"algo_config": [SmoothQuantConfig(), QuarotConfig()]}, "smoothing stands too early; rotate, then smooth"),
        ({"algo_config": [SmoothQuantConfig(), SmoothQuantConfig()]}, "more than one SmoothQuantConfig; give one"),
    ],
    ids=str,
)
def test_configurations_that_make_no_sense(arguments: dict, message: str) -> None:
    full = {"global_config": QLayerConfig(UInt8Spec(), Int8Spec()), "algo_config": [SmoothQuantConfig()]}
    with pytest.raises(ConfigError, match=message):
        QConfig(**(full | arguments))


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "0.5", True])
def test_alpha_is_a_part(alpha: object) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        SmoothQuantConfig(alpha)


def test_data_are_needed_and_a_place(llama_optimum: Path, tmp_path: Path) -> None:
    token = QLayerConfig(UInt8Spec(symmetric=True, quant_granularity="Token"), Int8Spec())
    config = QConfig(token, algo_config=[SmoothQuantConfig()])
    target = tmp_path / "q.onnx"
    with pytest.raises(InputError, match="smooth_quant needs calibration data"):
        ModelQuantizer(config).quantize_model(llama_optimum, target)
    neox = O("gpt_neox")
    with pytest.raises(ConfigError, match=r"nothing to smooth \(/gpt_neox.*leave out SmoothQuantConfig"):
        ModelQuantizer(config).quantize_model(neox, target, text_reader(neox))
    assert not list(tmp_path.iterdir())


def test_peaks_need_fewer_tokens_than_a_hessian(llama_optimum: Path, tmp_path: Path) -> None:
    token = QLayerConfig(UInt8Spec(symmetric=True, quant_granularity="Token"), Int4Spec())
    config = QConfig(token, algo_config=[SmoothQuantConfig(), RTNConfig()])
    ModelQuantizer(config).quantize_model(
        llama_optimum, tmp_path / "q.onnx", text_reader(llama_optimum, 1, 8), check=None
    )
    assert (recorded(model_io.load(tmp_path / "q.onnx")) or {})["transforms"][0]["places"] == 9


TOKEN = QLayerConfig(UInt8Spec(symmetric=True, quant_granularity="Token"), Int8Spec())


@pytest.mark.parametrize(
    ("make", "layer", "rotation", "counts", "places"),
    [
        (lambda: O("llama"), STATIC.global_config, QuarotConfig(), {"R1": 5, "R2": 2}, 9),
        (lambda: O("llama"), STATIC.global_config, QuarotConfig(r4=True), {"R1": 5, "R2": 2, "R4": 2}, 7),
        (lambda: O("llama"), TOKEN, QuarotConfig(), {"R1": 5, "R2": 2, "R4": 2}, 7),
        # Its up cannot be told from its gate: R4 does what smoothing cannot.
        (lambda: O("phi3"), STATIC.global_config, QuarotConfig(), {"R1": 5, "R2": 2, "R4": 2}, 7),
    ],
    ids=["static", "static, both", "token", "static phi3"],
)
def test_r4_is_left_to_places_that_cannot_be_smoothed(
    make: Callable[[], Path],
    layer: QLayerConfig,
    rotation: QuarotConfig,
    counts: dict[str, int],
    places: int,
    tmp_path: Path,
) -> None:
    source, target = make(), tmp_path / "q.onnx"
    config = QConfig(layer, algo_config=[rotation, SmoothQuantConfig()])
    outcome = quantize(source, target, config, text_reader(source), check=None)
    recipe = recorded(model_io.load(target)) or {}
    assert recipe["rotation"]["counts"] == counts
    assert recipe["transforms"][0]["places"] == places
    assert any("R4 left out" in note and "SmoothQuant scales" in note for note in outcome.notes) == ("R4" not in counts)
    assert not any("gain from" in note for note in outcome.notes)
