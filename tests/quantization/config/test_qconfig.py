# ruff: noqa: FBT003 - positions are what is tested
import pytest

from quarot_onnx.config import CalibMethod, Int8Spec, QConfig, QLayerConfig, QuarotConfig, UInt8Spec
from quarot_onnx.config.options import ALL_OPTIONS, HONOURED, IGNORED, REFUSED
from quarot_onnx.config.spec import Int4Spec, QTensorConfig
from quarot_onnx.errors import ConfigError
from quarot_onnx.processor import EXACT_PRODUCTS

W8A8 = QLayerConfig(UInt8Spec(), Int8Spec())
W8 = QLayerConfig(weight=Int8Spec(quant_granularity="channel"))


def told(config: QConfig) -> tuple[str, ...]:
    """The notes, without those on onnxruntime's kernels, which have a test of their own."""
    return tuple(note for note in config.notes if "without VNNI" not in note and "accuracy level" not in note)


def test_defaults():
    config = QConfig(W8A8)
    assert config.op_types_to_quantize == ("MatMul", "Gemm")
    assert config.specific_layer_config == config.layer_type_config == config.exclude == config.algo_config == ()
    assert config.quarot is None
    assert config.use_external_data_format is False
    assert config.calib_data_size is None
    assert told(config) == ()


def test_none_is_quarks_empty():
    assert QConfig(W8A8, None, None, None, None, extra_options=None, OpTypesToQuantize=None) == QConfig(W8A8)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"OpTypeToQuantize": ["MatMul"]}, "unknown key 'OpTypeToQuantize' .did you mean 'OpTypesToQuantize'"),
        ({"extra_options": {"CalibDataSizes": 3}}, "did you mean 'CalibDataSize'"),
        ({"extra_options": 3}, "extra_options is not a dict"),
        ({"extra_options": {"exclude": []}, "exclude": []}, "exclude given both"),
        ({"algo_configs": []}, "did you mean 'algo_config'"),
        ({"OpTypesToQuantize": ["Matmul"]}, r"op_types_to_quantize\[0\]='Matmul'.*did you mean 'MatMul'"),
        ({"OpTypesToQuantize": ["Conv"]}, "use MatMul or Gemm or Gather"),
        ({"OpTypesToQuantize": "MatMul"}, "a list is needed"),
        ({"ExtraOpTypesToQuantize": 3}, "are lists"),
        ({"OpTypesToQuantize": ["MatMul"], "op_types_to_quantize": ["MatMul"]}, "one and the same"),
        ({"MatMulConstBOnly": False}, "attention MatMuls stay in float"),
        ({"UseRandomData": True}, "calibrate on real text"),
        ({"TensorsRangeFile": "r.json"}, "TensorsRangeFile='r.json' is not supported"),
        ({"QuantizeAllOpTypes": True}, "name operators in OpTypesToQuantize"),
        ({"RMatrixDim": 64}, r"use algo_config=\[QuarotConfig"),
        ({"CalibDataSize": 0}, "calib_data_size=0"),
        ({"Percentile": 0.99}, "percentile=0.99"),
        ({"exclude": "/a"}, "a list is needed"),
        ({"exclude": [(["/a"], ["/b"])]}, r"exclude\[0\].*subgraphs .start, end. are not supported"),
        ({"exclude": ["^/a("]}, "not a regular expression"),
        ({"exclude": [""]}, "not a node name"),
        ({"algo_config": QuarotConfig()}, "a list is needed"),
        ({"algo_config": [QuarotConfig(), QuarotConfig()]}, "more than one QuarotConfig"),
        ({"algo_config": [{"name": "quorat"}]}, "no algorithm is named 'quorat' .did you mean 'quarot'"),
        ({"algo_config": [{"name": ["quarot"]}]}, "no algorithm is named"),
        ({"algo_config": [3]}, r"algo_config\[0\]=3: not an algorithm"),
        ({"specific_layer_config": {W8: [(["/a"], ["/b"])]}}, "subgraphs"),
        ({"specific_layer_config": {W8: []}}, "the list is empty; name one or more"),
        ({"specific_layer_config": [3]}, "a rule is a pair"),
        ({"specific_layer_config": 3}, "not a rule table"),
        ({"specific_layer_config": {"/a": 3}}, r"specific_layer_config\[0\]\.config=3"),
        ({"layer_type_config": {W8: ["MatMull"]}}, "'MatMull' is no quantizable operator .did you mean 'MatMul'"),
        ({"layer_type_config": {W8: ["Softmax"]}}, "use MatMul, Gemm, Gather"),
        ({"layer_type_config": {None: ["Matmul"]}}, "did you mean 'MatMul'"),
        ({"ignored_options": ["Foo"]}, "'Foo' is not an option"),
    ],
)
def test_wrong_keywords_are_named(keywords, message):
    with pytest.raises(ConfigError, match=rf"^QConfig.*{message}") as caught:
        QConfig(W8A8, **keywords)
    assert "\n" not in str(caught.value)


def test_global_config_is_needed():
    with pytest.raises(ConfigError, match=r"QConfig\.global_config: is missing"):
        QConfig()


def test_the_option_tables_do_not_overlap():
    assert len(set(ALL_OPTIONS)) == len(ALL_OPTIONS)
    assert set(HONOURED.values()) - {"extra_op_types_to_quantize"} <= set(QConfig.model_fields)


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_ignored_options_are_noted(name):
    config = QConfig(W8A8, **{name: True})
    assert config.ignored_options == (name,)
    assert told(config) == (f"{name} has no effect: {IGNORED[name]}",)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_options_may_ask_for_nothing(name):
    for nothing in (None, False):
        assert QConfig(W8A8, **{name: nothing}) == QConfig(W8A8)
    with pytest.raises(ConfigError, match=rf"{name}='something' is not supported: \w"):
        QConfig(W8A8, extra_options={name: "something"})


def test_options_that_say_what_is_so():
    assert QConfig(W8A8, MatMulConstBOnly=True, ExecutionProviders=["CPUExecutionProvider"]) == QConfig(W8A8)


def test_symmetry_options_change_what_a_spec_does_not_set():
    rule = {QLayerConfig(UInt8Spec(symmetric=False), Int8Spec()): ["/a"]}
    config = QConfig(W8A8, rule, ActivationSymmetric=True, WeightSymmetric=False)
    assert config.global_config == QLayerConfig(UInt8Spec(symmetric=True), Int8Spec(symmetric=False))
    assert config.layer_config_for("/a", "MatMul") == QLayerConfig(UInt8Spec(), Int8Spec(symmetric=False))


@pytest.mark.parametrize(
    ("layer", "option"),
    [
        (QLayerConfig(UInt8Spec(symmetric=False), Int8Spec()), {"ActivationSymmetric": True}),
        (QLayerConfig(UInt8Spec(), Int8Spec(symmetric=True)), {"WeightSymmetric": False}),
        (QLayerConfig(UInt8Spec(percentile=99.0), Int8Spec()), {"Percentile": 99.9}),
    ],
)
def test_options_that_contradict_the_global_config(layer, option):
    (name,) = option
    with pytest.raises(ConfigError, match=f"{name}.*contradicts.*give one of them"):
        QConfig(layer, **option)


def test_percentile_asks_for_percentile_calibration():
    activation = QConfig(W8A8, Percentile=99.9).global_config.activation
    assert (activation.calibration_method, activation.percentile) == (CalibMethod.Percentile, 99.9)


def test_percentile_beside_an_explicit_min_max_is_noted():
    config = QConfig(QLayerConfig(UInt8Spec(calibration_method="MinMax"), Int8Spec()), Percentile=99.9)
    assert config.global_config.activation.calibration_method is CalibMethod.MinMax
    assert told(config) == ("Percentile has no effect: no activation is calibrated by Percentile",)


def test_weights_only_drops_activations():
    assert QConfig(W8A8, {W8A8: ["/a"]}, WeightsOnly=True).layer_config_for("/a", "MatMul").activation is None


def test_notes_on_slow_and_surprising_settings():
    config = QConfig(QLayerConfig(Int8Spec(), Int8Spec(calibration_method="Percentile")), {W8: ["/a"]})
    slow, weight, rule = told(config)
    assert "UInt8Spec" in slow
    assert "weights take their true range" in weight
    assert "does not inherit" in rule


TOKEN = UInt8Spec(True, quant_granularity="Token")


@pytest.mark.parametrize("activation", [UInt8Spec(), TOKEN, Int8Spec(quant_granularity="Token")])
def test_int8_products_are_told(activation: QTensorConfig):
    def told_of(weight: QTensorConfig, **more: object) -> bool:
        config = QConfig(QLayerConfig(activation, weight), **more)
        return any("without VNNI" in note and EXACT_PRODUCTS in note for note in config.notes)

    assert told_of(Int8Spec())
    assert not told_of(UInt8Spec(True))
    assert not told_of(Int4Spec())
    assert not told_of(Int8Spec(), output_format="fake")
    assert told_of(UInt8Spec(True), specific_layer_config={QLayerConfig(activation, Int8Spec()): ["/a"]})
    assert not told_of(UInt8Spec(True), specific_layer_config={QLayerConfig(weight=Int8Spec()): ["/a"]})


def test_static_int8_activations_do_not_saturate():
    assert not [note for note in QConfig(QLayerConfig(Int8Spec(), Int8Spec())).notes if "without VNNI" in note]


def test_activations_of_8_bit_weights_alone_are_told():
    (note,) = (note for note in QConfig(W8).notes if "accuracy level 4" in note)
    assert "session.qdq_matmulnbits_accuracy_level=1" in note
    assert not [note for note in QConfig(QLayerConfig(weight=Int4Spec())).notes if "accuracy level" in note]
    level = QConfig(QLayerConfig(weight=Int8Spec(group_size=32)), accuracy_level=1)
    assert not [note for note in level.notes if "accuracy level" in note]


def test_exclude_beats_specific_beats_type_beats_global():
    a, b = QLayerConfig(weight=Int8Spec(symmetric=False)), QLayerConfig(UInt8Spec(True), Int8Spec())
    config = QConfig(
        W8A8, {a: ["/layers.0/*", "/x"], None: ["/layers.1/down"]}, {b: ["Gemm"]}, ["/layers.0/up", "^/head"]
    )
    assert config.layer_config_for("/layers.9/up", "MatMul") == W8A8
    assert config.layer_config_for("/layers.9/up", "Gemm") == b
    assert config.layer_config_for("/layers.0/down", "Gemm") == a
    assert config.layer_config_for("/x", "MatMul") == a
    assert config.layer_config_for("/layers.1/down", "MatMul") is None
    assert config.layer_config_for("/layers.0/up", "MatMul") is None
    assert config.layer_config_for("/head/MatMul", "MatMul") is None


def test_operator_types_that_are_not_quantized():
    config = QConfig(W8A8, {W8: ["/embed", "/l*"]}, {None: ["Gemm", "LayerNormalization", "Mul", "GatherND"]})
    assert config.layer_config_for("/b", "Gemm") is None
    assert config.layer_config_for("/b", "Gather") is None
    assert config.layer_config_for("/lookup", "Gather") is None
    with pytest.raises(ConfigError, match="node '/embed' is a Gather, which is not quantized"):
        config.layer_config_for("/embed", "Gather")


@pytest.mark.parametrize(
    "keywords",
    [
        {"OpTypesToQuantize": ["MatMul", "Gather"]},
        {"ExtraOpTypesToQuantize": ["Gather"]},
        {"layer_type_config": {W8A8: ["Gather"]}},
    ],
)
def test_ways_to_quantize_the_embedding(keywords):
    assert QConfig(W8A8, **keywords).layer_config_for("/embed", "Gather") == W8A8


def test_only_the_given_nodes():
    config = QConfig(W8A8, NodesToQuantize=["/a", "/b*"])
    assert config.layer_config_for("/a", "MatMul") == W8A8
    assert config.layer_config_for("/bc", "MatMul") == W8A8
    assert config.layer_config_for("/c", "MatMul") is None


def test_a_global_none_leaves_all_else_in_float():
    config = QConfig(None, {W8: ["/a"]})
    assert config.layer_config_for("/a", "MatMul") == W8
    assert config.layer_config_for("/b", "MatMul") is None


def test_names_with_brackets_match_themselves():
    assert QConfig(W8A8, exclude=["/a[0]"]).layer_config_for("/a[0]", "MatMul") is None


def test_unmatched_patterns():
    config = QConfig(W8A8, {W8: ["/a", "/z*"]}, exclude=["^/b.*", "/q", "/q"], NodesToQuantize=["/a?", "/w"])
    assert config.unmatched_patterns(["/a", "/b1", "/a1"]) == ["/q", "/w", "/z*"]


@pytest.mark.parametrize(
    "rules",
    [
        {W8: ["/a", "/b"]},
        [(W8, ["/a", "/b"])],
        [[W8, ["/a", "/b"]]],
        [{"config": W8, "layers": ["/a", "/b"]}],
    ],
)
def test_spellings_of_rules(rules):
    (rule,) = QConfig(W8A8, rules).specific_layer_config
    assert (rule.config, rule.layers) == (W8, ("/a", "/b"))


def test_rules_by_name():
    config = QConfig(W8A8, {"/a": W8, "/b": None})
    assert config.layer_config_for("/a", "MatMul") == W8
    assert config.layer_config_for("/b", "MatMul") is None
