"""ModelQuantizer: AMD Quark's documented example with only its imports changed, and what callers may rely on."""

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import exports
import linear_graphs as graphs
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import CalibrationDataReader

from quarot_onnx import (
    Int8Spec,
    KVCacheConfig,
    ModelQuantizer,
    QConfig,
    QLayerConfig,
    QuarotConfig,
    SinkPrefixConfig,
    SmoothQuantConfig,
    UInt8Spec,
    pipeline,
)
from quarot_onnx.calibration.feeds import ModelInputs
from quarot_onnx.calibration.readers import TextReader
from quarot_onnx.errors import CalibrationError, ConfigError, ModelError, OutputError
from quarot_onnx.sites.detect import detect

HIDDEN = 64
W8 = QLayerConfig(weight=Int8Spec())
STATIC = QLayerConfig(activation=UInt8Spec(), weight=Int8Spec())
PER_TOKEN = QLayerConfig(UInt8Spec(symmetric=True, quant_granularity="Token"), Int8Spec(quant_granularity="Channel"))


class Reader(CalibrationDataReader):
    """Two samples of different length, no rewind: the least that onnxruntime asks for."""

    def __init__(self, path: Path) -> None:
        inputs, rng = ModelInputs.from_path(path), np.random.default_rng(0)
        self._feeds: Iterator[Any] = iter([inputs.feed(rng.integers(0, 256, (1, length))) for length in (11, 23)])

    def get_next(self) -> Any:
        return next(self._feeds, None)


def write_pairs(path: Path, target: Path) -> Path:
    """What a user of Quark would write by hand."""
    pairs = [
        {
            "prev_nodes": [node.name for node in site.previous],
            "norm_node": site.norm.name,
            "next_nodes": [reader.name for reader in site.readers],
        }
        for site in detect(ir.load(path)).norms
    ]
    target.write_text(json.dumps({"R1_pairs": pairs}))
    return target


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recipe(model: onnx.ModelProto) -> dict[str, Any]:
    return json.loads({entry.key: entry.value for entry in model.metadata_props}["quarot_onnx.recipe"])


@pytest.fixture
def source() -> Path:
    return exports.optimum_export("llama")


def test_quarks_example_runs_with_its_imports_changed(source: Path, tmp_path: Path) -> None:
    from quarot_onnx import ModelQuantizer  # noqa: PLC0415
    from quarot_onnx.quantization.config import QConfig  # noqa: PLC0415
    from quarot_onnx.quantization.config.algorithm import QuarotConfig  # noqa: PLC0415
    from quarot_onnx.quantization.config.spec import Int8Spec, QLayerConfig, UInt8Spec  # noqa: PLC0415

    r_config_path = str(write_pairs(source, tmp_path / "rotation_config.json"))
    before = digest(source)
    quarot_config = QuarotConfig(r_matrix_dim=HIDDEN, use_random_had=False, r_config_path=r_config_path)
    quant_config = QConfig(
        global_config=QLayerConfig(activation=UInt8Spec(), weight=Int8Spec()),
        algo_config=[quarot_config],
        use_external_data_format=True,
        OpTypesToQuantize=["MatMul", "Gemm"],
    )
    quantizer = ModelQuantizer(quant_config)
    assert quantizer.quantize_model(str(source), str(tmp_path / "q.onnx"), Reader(source)) is None
    assert digest(source) == before
    assert (tmp_path / "q.onnx.data").is_file()
    written = onnx.load(tmp_path / "q.onnx", load_external_data=False)
    assert recipe(written)["rotation"]["counts"] == {"R1": 5}, "R1_pairs states R1 and nothing else"
    assert recipe(written)["quantization"]["linears"] == 15
    assert quantizer.outcome is not None
    assert quantizer.outcome.equivalence is not None
    assert quantizer.outcome.equivalence.passed
    with pytest.raises(CalibrationError):
        quantizer.quantize_model(str(source), str(tmp_path / "r.onnx"), None)
    assert quantizer.outcome is None, "the one of the run before says nothing of this one"


@pytest.mark.parametrize("module", ["", ".algorithm", ".config", ".data_type", ".spec"])
def test_quarks_import_paths_hold_the_same_names(module: str) -> None:
    theirs, ours = (
        import_module(f"{room}{module}") for room in ("quarot_onnx.quantization.config", "quarot_onnx.config")
    )
    assert all(getattr(theirs, name) is getattr(ours, name) for name in ours.__all__)


def test_the_short_imports_are_the_same_names() -> None:
    import quarot_onnx  # noqa: PLC0415
    from quarot_onnx.config import QConfig, algorithm, enums, spec  # noqa: PLC0415

    assert quarot_onnx.QConfig is QConfig
    homes = {"QLayerConfig": spec, "Int8Spec": spec, "UInt8Spec": spec, "QuarotConfig": algorithm, "CalibMethod": enums}
    for name, module in homes.items():
        assert getattr(quarot_onnx, name) is getattr(module, name)


def test_a_model_in_memory_comes_back_in_memory() -> None:
    proto = graphs.two_linears()
    before = proto.SerializeToString()
    result = ModelQuantizer(QConfig(W8)).quantize_model(proto)
    assert isinstance(result, onnx.ModelProto)
    assert proto.SerializeToString() == before
    onnx.checker.check_model(result)
    x = np.random.default_rng(0).standard_normal((1, 3, graphs.IN)).astype(np.float32)
    expected = graphs.run(proto, {"x": x})
    # Half a step of 254 per weight, 24 terms of random sign: about 1 %.
    assert np.abs(graphs.run(result, {"x": x}) - expected).max() < 0.03 * np.abs(expected).max()


def test_a_decoder_in_memory_is_rotated_too(source: Path) -> None:
    result = ModelQuantizer(QConfig(PER_TOKEN, algo_config=[QuarotConfig()])).quantize_model(onnx.load(source))
    assert isinstance(result, onnx.ModelProto)
    assert set(recipe(result)["rotation"]["counts"]) == {"R1", "R2", "R4"}


def test_a_path_may_come_back_in_memory(source: Path, tmp_path: Path) -> None:
    result = ModelQuantizer(QConfig(W8)).quantize_model(source, None)
    assert isinstance(result, onnx.ModelProto)
    ModelQuantizer(QConfig(W8)).quantize_model(source, tmp_path / "q.onnx")
    assert onnx.load(tmp_path / "q.onnx").SerializeToString() == result.SerializeToString()
    assert not (tmp_path / "q.onnx.data").exists(), "small models are one file"


def test_rules_are_honoured(source: Path, tmp_path: Path) -> None:
    head = next(linear.name for linear in detect(ir.load(source)).head)
    config = QConfig(
        STATIC,
        {W8: ["*layers.0/mlp/down_proj*"]},
        {QLayerConfig(weight=Int8Spec(quant_granularity="Channel")): ["Gather"]},
        [head],
    )
    ModelQuantizer(config).quantize_model(source, tmp_path / "q.onnx", Reader(source))
    written = onnx.load(tmp_path / "q.onnx", load_external_data=False)
    content = recipe(written)["quantization"]
    assert (content["linears"], content["embeddings"]) == (14, 1)
    dequantized = [node for node in written.graph.node if node.op_type == "DequantizeLinear"]
    # 14 weights; per layer 4 inputs (q, k and v share theirs, gate and up too) but for one down_proj.
    assert len(dequantized) == 14 + 2 * 4 - 1
    graph_names = {node.name for node in written.graph.node}
    assert head in graph_names, "left as it was"


class Again(Reader):
    """The same with a rewind."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._all = list(self._feeds)
        self.rewind()

    def rewind(self) -> None:
        self._feeds = iter(self._all)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("case", ["optimum llama", "genai", "dynamo cache"])
def test_a_reader_that_cannot_start_over_will_do(case: str, smoothed: bool, tmp_path: Path) -> None:
    """R2 turns the cache, and so the pasts that a reader gives; the ranges are read from what was turned."""
    path = exports.EXPORTS[case]()
    algorithms = [QuarotConfig(), *([SmoothQuantConfig()] if smoothed else [])]
    config = QConfig(QLayerConfig(UInt8Spec(), UInt8Spec()), algo_config=algorithms)
    for name, reader in (("once.onnx", Reader(path)), ("again.onnx", Again(path))):
        ModelQuantizer(config).quantize_model(path, tmp_path / name, reader)
    assert digest(tmp_path / "once.onnx") == digest(tmp_path / "again.onnx")


def test_the_reader_is_asked_for_first(source: Path, tmp_path: Path) -> None:
    config = QConfig(STATIC, algo_config=[QuarotConfig()])
    with pytest.raises(CalibrationError, match="pass a CalibrationDataReader"):
        ModelQuantizer(config).quantize_model(source, tmp_path / "q.onnx")
    assert not list(tmp_path.iterdir())


def test_names_are_checked_first(source: Path, tmp_path: Path) -> None:
    config = QConfig(W8, exclude=["/lm_head/MatMull"], algo_config=[QuarotConfig()])
    with pytest.raises(ConfigError, match=r"'/lm_head/MatMull'.*did you mean '/lm_head/MatMul'"):
        ModelQuantizer(config).quantize_model(source, tmp_path / "q.onnx")
    assert not list(tmp_path.iterdir())


def test_a_wrong_r_matrix_dim_names_both(source: Path, tmp_path: Path) -> None:
    config = QConfig(W8, algo_config=[QuarotConfig(r_matrix_dim=4096)])
    with pytest.raises(ConfigError, match=r"4096.*64"):
        ModelQuantizer(config).quantize_model(source, tmp_path / "q.onnx")


def test_a_rotated_model_is_quantized_as_it_is(source: Path, tmp_path: Path) -> None:
    """With a configuration that says nothing else than what was done, or nothing of rotation."""
    from quarot_onnx.pipeline import rotate  # noqa: PLC0415

    done = QuarotConfig(use_random_had=True, seed=7, block_size=2)
    rotate(source, tmp_path / "r.onnx", done, verify=False)
    same = QuarotConfig(r_matrix_dim=HIDDEN, r1=True, r2=True, r3=False, r4=True, seed=7)
    for agreeing in (done, QuarotConfig(), same, None):
        quantizer = ModelQuantizer(QConfig(W8, algo_config=[] if agreeing is None else [agreeing]))
        quantizer.quantize_model(tmp_path / "r.onnx", tmp_path / "q.onnx")
        assert quantizer.outcome is not None
        assert quantizer.outcome.equivalence is None, "nothing was rotated"
        assert recipe(onnx.load(tmp_path / "q.onnx"))["rotation"] == recipe(onnx.load(tmp_path / "r.onnx"))["rotation"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"r4": False}, r"rotated with R4 \(R1 at 5 places.*\), and the .* asks for r4=False \(online_rotate\)"),
        ({"r3": True}, r"rotated without R3 \(.*asks for r3=True"),
        ({"r1": False, "r4": True}, r"rotated with R1 .*asks for r1=False"),
        ({"seed": 0}, r"rotated with seed=7, and the configuration asks for seed=0; rotate the original anew"),
        ({"use_random_had": False}, r"rotated with use_random_had=True, and .* asks for use_random_had=False"),
        ({"seed": 8}, r"rotated with seed=7, and the configuration asks for seed=8; rotate the original anew"),
        ({"r_matrix_dim": 32}, r"rotated with r_matrix_dim=64, and the configuration asks for r_matrix_dim=32"),
        ({"block_size": 4}, r"rotated with block_size=None, and the configuration asks for block_size=4"),
        ({"r1_matrix_path": "other.npy"}, r"rotated with r1_matrix_path=None, .* asks for r1_matrix_path=other.npy"),
    ],
)
def test_a_rotated_model_and_another_rotation_are_refused(
    asked: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    from quarot_onnx.pipeline import rotate  # noqa: PLC0415

    rotate(source, tmp_path / "r.onnx", QuarotConfig(use_random_had=True, seed=7), verify=False)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=message):
        ModelQuantizer(QConfig(W8, algo_config=[QuarotConfig(**asked)])).quantize_model(
            tmp_path / "r.onnx", tmp_path / "q.onnx"
        )
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_rotated_without_r4_does_not_pass_for_one_with_it(source: Path, tmp_path: Path) -> None:
    from quarot_onnx.pipeline import rotate  # noqa: PLC0415

    rotate(source, tmp_path / "r.onnx", QuarotConfig(r4=False), verify=False)
    with pytest.raises(ConfigError, match=r"without R4 .*asks for r4=True \(online_rotate\)"):
        ModelQuantizer(QConfig(PER_TOKEN, algo_config=[QuarotConfig(r4=True)])).quantize_model(
            tmp_path / "r.onnx", tmp_path / "q.onnx"
        )


def test_a_model_is_rotated_once(source: Path, tmp_path: Path) -> None:
    from quarot_onnx.pipeline import rotate  # noqa: PLC0415

    rotate(source, tmp_path / "r.onnx", QuarotConfig(), verify=False)
    with pytest.raises(ModelError, match=r"already rotated \(R1 at 5 places.*start from the original, or quantize"):
        rotate(tmp_path / "r.onnx", tmp_path / "q.onnx", QuarotConfig(), verify=False)


@pytest.mark.parametrize("given", [42, {"model": 1}, onnx.GraphProto()], ids=["int", "dict", "GraphProto"])
def test_other_inputs_are_refused(given: Any) -> None:
    with pytest.raises(ModelError, match=type(given).__name__):
        ModelQuantizer(QConfig(W8)).quantize_model(given)


def test_an_output_that_is_no_path_is_refused_before_any_work(source: Path) -> None:
    with pytest.raises(OutputError, match="model_output is a int"):
        ModelQuantizer(QConfig(W8)).quantize_model(source, 3)  # type: ignore[arg-type]


def test_an_output_without_a_suffix_is_refused(source: Path, tmp_path: Path) -> None:
    """It was meant for a folder, beside which a model's other files would be strewn."""
    for work in (ModelQuantizer(QConfig(W8)).quantize_model, lambda *paths: pipeline.rotate(*paths, QuarotConfig())):
        with pytest.raises(OutputError, match=r"out is no name of an .onnx file: give one, such as .*out/model.onnx"):
            work(source, tmp_path / "out")
    with pytest.raises(OutputError, match="overwrite is 'no': give True, False, or None"):
        ModelQuantizer(QConfig(W8)).quantize_model(source, tmp_path / "q.onnx", overwrite="no")  # type: ignore[arg-type]
    assert not list(tmp_path.glob("out*"))


def test_settings_of_other_types_are_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    quantizer = ModelQuantizer(QConfig(PER_TOKEN))
    with pytest.raises(ConfigError, match="check is a bool; pass a Check, or None"):
        quantizer.quantize_model(source, tmp_path / "out.onnx", check=False)
    with pytest.raises(ConfigError, match="memory is a str; pass a Memory"):
        quantizer.quantize_model(source, tmp_path / "out.onnx", memory="8GB")


def test_incomplete_models_in_memory_are_refused() -> None:
    with pytest.raises(ModelError, match="without nodes"):
        ModelQuantizer(QConfig(W8)).quantize_model(onnx.ModelProto())
    with pytest.raises(ModelError, match=r"'model\.onnx\.data'; pass the model's path"):
        ModelQuantizer(QConfig(W8)).quantize_model(onnx.load(exports.genai_like(), load_external_data=False))


def test_other_configurations_are_refused() -> None:
    with pytest.raises(ConfigError, match="takes a QConfig, not dict"):
        ModelQuantizer({"weight": "int8"})  # type: ignore[arg-type]


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    onnx.save(graphs.two_linears(), tmp_path / "m.onnx")
    before = digest(tmp_path / "m.onnx")
    with pytest.raises(OutputError, match="overwrite the input"):
        ModelQuantizer(QConfig(W8)).quantize_model(tmp_path / "m.onnx", tmp_path / "m.onnx")
    assert digest(tmp_path / "m.onnx") == before


def test_notes_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    onnx.save(graphs.two_linears(), tmp_path / "m.onnx")
    ModelQuantizer(QConfig(W8, OptimizeModel=True)).quantize_model(tmp_path / "m.onnx", tmp_path / "q.onnx")
    assert "OptimizeModel has no effect" in caplog.text


def test_int8_per_token_is_as_good_as_uint8() -> None:
    layer = QLayerConfig(Int8Spec(quant_granularity="Token"), Int8Spec(quant_granularity="Channel"))
    assert not [note for note in QConfig(layer).notes if "slower" in note]
    assert "slower" in QConfig(QLayerConfig(Int8Spec(), Int8Spec())).notes[0]
    int8, uint8 = (
        ModelQuantizer(QConfig(config)).quantize_model(graphs.two_linears()) for config in (layer, PER_TOKEN)
    )
    assert int8 is not None
    assert uint8 is not None
    x = np.random.default_rng(0).standard_normal((1, 3, graphs.IN)).astype(np.float32)
    np.testing.assert_array_equal(graphs.run(int8, {"x": x}), graphs.run(uint8, {"x": x}))


@pytest.mark.parametrize("step", ["rotate", "quantize"])
def test_a_fake_quantized_model_is_quantized(step: str, source: Path, tmp_path: Path) -> None:
    """Its graph is a float one; the recipe in it tells."""
    from quarot_onnx.pipeline import rotate  # noqa: PLC0415

    fake = QConfig(W8, output_format="fake")
    ModelQuantizer(fake).quantize_model(source, tmp_path / "fake.onnx")
    before = sorted(tmp_path.iterdir())
    again = partial(rotate, config=QuarotConfig()) if step == "rotate" else ModelQuantizer(QConfig(W8)).quantize_model
    with pytest.raises(ModelError, match="already quantized, as its recipe says; start from the float32"):
        again(tmp_path / "fake.onnx", tmp_path / "q.onnx")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("r4", "config", "note"),
    [
        (False, PER_TOKEN, "rotated without R4, which quantized activations gain from"),
        (True, W8, "rotated with R4, which costs time at every step"),
        (True, PER_TOKEN, None),
        (False, W8, None),
    ],
)
def test_a_rotation_that_suits_another_scheme_is_told(
    r4: bool, config: QLayerConfig, note: str | None, source: Path, tmp_path: Path
) -> None:
    from quarot_onnx.pipeline import rotate  # noqa: PLC0415

    rotate(source, tmp_path / "r.onnx", QuarotConfig(r4=r4), verify=False)
    for algorithms in ([], [QuarotConfig()]):
        quantizer = ModelQuantizer(QConfig(config, algo_config=algorithms))
        quantizer.quantize_model(tmp_path / "r.onnx", tmp_path / "q.onnx")
        assert quantizer.outcome is not None
        assert [item for item in quantizer.outcome.notes if note and note in item] or note is None
        assert note is not None or not [item for item in quantizer.outcome.notes if "R4" in item]


def test_a_prefix_in_a_file_needs_an_output(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = exports.optimum_export("llama")
    config = QConfig(W8, algo_config=[SinkPrefixConfig(form="npz", ids=[256, 84])])
    reader = TextReader(source, samples=1, seq_len=16)
    with pytest.raises(ConfigError, match="without model_output there is none: name a file"):
        ModelQuantizer(config).quantize_model(source, None, reader)
    ModelQuantizer(config).quantize_model(source, tmp_path / "m.onnx", reader, check=None)
    inside = QConfig(W8, algo_config=[SinkPrefixConfig(form="graph", ids=[256, 84])])
    assert ModelQuantizer(inside).quantize_model(source, None, reader, check=None) is not None
    caplog.clear()
    cached = QConfig(W8, algo_config=[KVCacheConfig(bits=8, scales="channel")])
    path = exports.genai_like()
    ModelQuantizer(cached).quantize_model(path, None, TextReader(path, samples=1, seq_len=16), check=None)
    assert "without model_output the file of scales is not kept" in caplog.text
