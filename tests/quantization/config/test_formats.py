# ruff: noqa: FBT003 - positions are what is tested
import json
import re

import pytest

from quarot_onnx.config import (
    GPTQConfig,
    Int2Spec,
    Int3Spec,
    Int4Spec,
    Int8Spec,
    OutputFormat,
    QConfig,
    QLayerConfig,
    QronosConfig,
    QTensorConfig,
    QuarotConfig,
    RTNConfig,
    UInt4Spec,
    UInt8Spec,
)
from quarot_onnx.config.storage import blocked_bits
from quarot_onnx.errors import ConfigError

STATIC = UInt8Spec()
STATIC4 = Int4Spec(quant_granularity="Tensor")
TOKEN = UInt8Spec(True, quant_granularity="Token")
W8 = QLayerConfig(weight=Int8Spec())
W4 = QLayerConfig(weight=Int4Spec())
W4G = QLayerConfig(weight=Int4Spec(group_size=128))
W4A8 = QLayerConfig(TOKEN, Int4Spec())
W8A8 = QLayerConfig(TOKEN, Int8Spec())


def token(owner: type[QTensorConfig], **keywords) -> QTensorConfig:
    return owner(quant_granularity="Token", **keywords)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (W8, "qdq"),
        (W8A8, "qdq"),
        (QLayerConfig(STATIC, Int8Spec()), "qdq"),
        (QLayerConfig(STATIC, Int8Spec(), output_tensors=STATIC), "qdq"),
        (W4A8, "w4a8"),
        (QLayerConfig(STATIC, Int4Spec()), "w4a8"),
        (QLayerConfig(token(Int8Spec), UInt4Spec()), "w4a8"),
        (QLayerConfig(token(Int8Spec, clip_ratio=0.9), Int3Spec()), "w4a8"),
        (W4, "nbits"),
        (W4G, "nbits"),
        (QLayerConfig(weight=Int2Spec()), "nbits"),
        (QLayerConfig(weight=Int3Spec(group_size=32)), "nbits"),
        (QLayerConfig(weight=Int8Spec(group_size=32)), "nbits"),
        (QLayerConfig(UInt8Spec(clip_ratio=0.9), Int8Spec()), "w8"),
        (QLayerConfig(token(Int4Spec), Int4Spec()), "fake"),
        (QLayerConfig(STATIC4, Int4Spec()), "fake"),
        (QLayerConfig(STATIC4, Int8Spec()), "fake"),
        (QLayerConfig(UInt4Spec(quant_granularity="Tensor", clip_ratio=0.9), Int2Spec(group_size=32)), "fake"),
        (QLayerConfig(token(UInt8Spec), Int4Spec()), "fake"),
        (QLayerConfig(token(UInt8Spec), Int8Spec()), "fake"),
        (QLayerConfig(token(Int8Spec, group_size=64), Int4Spec()), "fake"),
        (QLayerConfig(TOKEN, Int4Spec(group_size=128)), "fake"),
        (QLayerConfig(TOKEN, Int4Spec(quant_granularity="Tensor")), "fake"),
        (QLayerConfig(weight=Int4Spec(group_size=48)), "fake"),
    ],
)
def test_the_format_that_is_chosen(layer, expected):
    config = QConfig(layer)
    assert config.resolved_format == expected
    assert config.low_bit is (expected != "qdq")
    said = [note for note in config.notes if note.startswith("the format fake was chosen, as ")]
    assert len(said) == (expected == "fake")
    assert not [note for note in said if re.search("; |Spec|=True|=None", note)], "the way out is for errors"
    assert not said or said[0].endswith(": float32 for studies, no smaller and no faster")


def test_the_choice_of_fake_is_told_in_words_that_all_users_know():
    (note,) = QConfig(QLayerConfig(token(Int4Spec), Int4Spec())).notes
    assert note.startswith("the format fake was chosen, as w4a8 has activations of 8 bits, not 4: float32")
    (note,) = QConfig(QLayerConfig(token(UInt8Spec), Int8Spec())).notes
    assert "as w8 has symmetric activations per token:" in note


@pytest.mark.parametrize(
    ("arguments", "output_format", "said"),
    [
        ((QLayerConfig(weight=Int3Spec()),), None, "3-bit weights are stored in 4 bits by nbits"),
        ((QLayerConfig(weight=Int2Spec(group_size=32)),), "nbits", "2-bit weights are stored in 4 bits by nbits"),
        ((QLayerConfig(weight=Int2Spec()),), None, "2-bit weights are stored in 4 bits by nbits"),
        ((QLayerConfig(TOKEN, Int3Spec()),), None, "3-bit weights are stored in 4 bits by w4a8"),
        (
            (QLayerConfig(weight=Int3Spec()), {QLayerConfig(weight=Int2Spec()): ["/a"], W4: ["/b"], W8: ["/c"]}),
            None,
            "2-bit and 3-bit weights are stored in 4 bits by nbits",
        ),
        ((W8A8, {W4A8: ["/a"]}), None, "4-bit weights are stored in 8 bits by w8"),
        ((QLayerConfig(TOKEN, Int3Spec()),), "w8", None),  # as its name says
        ((QLayerConfig(weight=Int3Spec()),), "fake", None),
        ((W4,), None, None),
        ((W4A8, {W8: ["/head"]}, {W4: ["Gather"]}), None, None),
        ((W8A8, {}, {W4: ["Gather"]}), None, None),  # embeddings of 4 bits are stored in 4
    ],
)
def test_weights_stored_in_more_bits_than_they_have(arguments, output_format, said):
    notes = [note for note in QConfig(*arguments, output_format=output_format).notes if "stored in" in note]
    assert len(notes) == (said is not None)
    assert said is None or notes[0].startswith(said)


@pytest.mark.parametrize(("layer", "expected"), [(W8, "nbits"), (W8A8, "w8"), (W4A8, "w4a8")])
def test_a_rounding_needs_a_format(layer, expected):
    assert QConfig(layer, algo_config=[RTNConfig()]).resolved_format == expected
    assert QConfig(layer, algo_config=[QuarotConfig()]).low_bit is (layer is W4A8)


def test_a_low_bit_rule_needs_a_format():
    assert QConfig(W8A8, {W4A8: ["/a"]}).resolved_format is OutputFormat.W8
    assert QConfig(W8, {W4G: ["/a"]}).resolved_format is OutputFormat.NBITS
    assert QConfig(None, {W4A8: ["/a"]}).resolved_format is OutputFormat.W4A8
    assert QConfig(W8A8, layer_type_config={W4: ["Gather"]}).resolved_format is OutputFormat.W8
    assert QConfig(None, layer_type_config={W4: ["Gather"]}).resolved_format is OutputFormat.NBITS
    assert QConfig(None).resolved_format is OutputFormat.QDQ


def test_qdq_may_be_named_and_takes_roundings_too():
    assert not QConfig(W8, output_format="qdq").low_bit
    assert QConfig(W8, output_format="qdq", algo_config=[RTNConfig()]).low_bit
    assert (
        QConfig(QLayerConfig(STATIC, Int8Spec(), output_tensors=STATIC), output_format="qdq").resolved_format == "qdq"
    )
    fixed = "qdq holds weights of 8 bits, and of 4 beside activations with a fixed scale, which these have not"
    with pytest.raises(ConfigError, match=f"{fixed}; use output_format='w8', or leave out output_format"):
        QConfig(W4A8, output_format="qdq")
    with pytest.raises(ConfigError, match=r"qdq has symmetric activations per token; .*or use symmetric=True"):
        QConfig(QLayerConfig(token(UInt8Spec), Int8Spec()), output_format="qdq")
    with pytest.raises(ConfigError, match="qdq holds embeddings of 8 bits, not 4; use weight=Int8Spec"):
        QConfig(W8, layer_type_config={W4: ["Gather"]}, output_format="qdq")


@pytest.mark.parametrize("layer", [W4, W4G, QLayerConfig(token(UInt8Spec), Int8Spec())])
def test_qdq_by_name_holds_for_nodes_by_name_beside_embeddings(layer):
    """Only the graph knows whether such a name is an embedding's."""
    with pytest.raises(ConfigError, match="specific_layer_config"):
        QConfig(W8, {layer: ["/q"]}, OpTypesToQuantize=["MatMul", "Gather"], output_format="qdq").layer_config_for(
            "/q", "MatMul"
        )


@pytest.mark.parametrize("spelling", ["w4a8", "W4A8", OutputFormat.W4A8, "OutputFormat.W4A8"])
def test_spellings(spelling):
    assert QConfig(W4A8, output_format=spelling).output_format is OutputFormat.W4A8


@pytest.mark.parametrize(
    ("layer", "output_format"),
    [
        (W8, "w8"),
        (W8, "nbits"),
        (W8, "fake"),
        (W4, "w8"),
        (W4A8, "w8"),
        (QLayerConfig(TOKEN, Int2Spec(quant_granularity="Tensor")), "w8"),
        (QLayerConfig(token(Int4Spec, group_size=48), Int3Spec(group_size=48)), "fake"),
        *((QLayerConfig(weight=Int4Spec(group_size=size)), "nbits") for size in (16, 32, 64, 128, 256)),
    ],
)
def test_formats_that_are_named(layer, output_format):
    config = QConfig(layer, output_format=output_format)
    assert config.resolved_format == output_format
    assert config.low_bit
    assert not [note for note in config.notes if "accuracy level" not in note]


@pytest.mark.parametrize(
    ("layer", "output_format", "message"),
    [
        (W8A8, "w4a8", r"w4a8 does not take global_config with weight=Int8Spec\(Tensor\): .*use output_format='w8'"),
        (W4, "w4a8", "w4a8 needs 8-bit activations; use activation=UInt8Spec.*output_format='nbits'"),
        (
            QLayerConfig(TOKEN, Int4Spec(group_size=128)),
            "w4a8",
            "a scale per channel; use output_format='fake', or leave",
        ),
        (QLayerConfig(TOKEN, Int4Spec(quant_granularity="Tensor")), "w4a8", "use quant_granularity='Channel'"),
        (QLayerConfig(token(Int4Spec), Int4Spec()), "w4a8", "activations of 8 bits, not 4; use output_format='fake'"),
        (QLayerConfig(STATIC4, Int4Spec()), "w4a8", "activations of 8 bits, not 4; use output_format='fake'"),
        (QLayerConfig(STATIC4, Int8Spec()), "w8", "activations of 8 bits, not 4; use output_format='fake'"),
        (QLayerConfig(STATIC4, Int4Spec()), "nbits", "use activation=None"),
        (
            QLayerConfig(STATIC4, Int4Spec(), output_tensors=STATIC),
            "fake",
            "leaves outputs in float; use output_format='qdq', or leave out output_t",
        ),
        (
            QLayerConfig(token(UInt8Spec), Int4Spec()),
            "w4a8",
            "symmetric activations per token; use output_format='fake', or use symm",
        ),
        (W4A8, "nbits", "accuracy level 4 rounds them to int8 as it computes.; use activation=None"),
        (QLayerConfig(weight=Int4Spec(group_size=48)), "nbits", "groups of 16, 32, 64, 128 or 256, not 48"),
        (W4G, "w8", "scale per channel; use output_format='nbits' or output_format='fake', or leave out group"),
        (
            QLayerConfig(token(Int8Spec, group_size=64), Int8Spec()),
            "w8",
            "one scale per token; use output_format='fake', or leave out group_size",
        ),
        (
            QLayerConfig(STATIC, Int8Spec(), output_tensors=STATIC),
            "fake",
            "leaves outputs in float; use output_format='qdq', or leave out output_t",
        ),
        (W4, "w4a4", "output_format='w4a4': no OutputFormat has this name; use qdq or w4a8 or nbits or w8 or fake"),
    ],
)
def test_formats_that_do_not_fit(layer, output_format, message):
    with pytest.raises(ConfigError, match=rf"^QConfig.*{message}") as caught:
        QConfig(layer, output_format=output_format)
    assert "\n" not in str(caught.value)


def test_rules_fit_the_format_too():
    assert QConfig(W4A8, {W8: ["/head"]}, {W8A8: ["Gemm"]}).resolved_format is OutputFormat.W4A8
    with pytest.raises(
        ConfigError, match=r"w4a8 \(chosen for global_config\) does not take specific_layer_config\[1\]"
    ):
        QConfig(W4A8, [(W8, ["/head"]), (W4, ["/a"])])
    with pytest.raises(ConfigError, match=r"output_format=nbits does not take layer_type_config\[0\]"):
        QConfig(W4, {}, {W8A8: ["Gemm"]}, output_format="nbits")


@pytest.mark.parametrize("level", range(5))
def test_accuracy_levels(level):
    assert QConfig(W4G, accuracy_level=level).accuracy_level == level
    assert QConfig(W8, output_format="nbits", accuracy_level=level).low_bit


@pytest.mark.parametrize(
    ("layer", "level", "message"),
    [
        (
            W4A8,
            4,
            "accuracy_level=4: only nbits has it, .* float, not w4a8; use activation=None, or leave out accuracy_level",
        ),
        (W8, 0, "accuracy_level=0: only nbits has it, not qdq; use output_format='nbits', or leave out"),
        (W4, 5, "accuracy_level=5: .*less than or equal to 4"),
        (W4, True, "accuracy_level=True"),
    ],
)
def test_accuracy_levels_out_of_place(layer, level, message):
    with pytest.raises(ConfigError, match=message):
        QConfig(layer, accuracy_level=level)


@pytest.mark.parametrize("layer", [W4A8, W4G, W8A8])
@pytest.mark.parametrize(
    "table", [Int8Spec(), Int8Spec(quant_granularity="Channel"), Int4Spec(), Int4Spec(group_size=32)]
)
def test_embeddings_in_every_format(layer, table):
    rule = QLayerConfig(weight=table)
    config = QConfig(layer, layer_type_config={rule: ["Gather"]}, algo_config=[GPTQConfig()])
    assert config.layer_config_for("/embed", "Gather") == rule
    by_name = QConfig(layer, {rule: ["/embed"]}, OpTypesToQuantize=["MatMul", "Gather"], output_format="fake")
    assert by_name.layer_config_for("/embed", "Gather") == rule


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (Int3Spec(), "embeddings have 4 or 8 bits, not 3"),
        (Int8Spec(group_size=32), "8-bit embeddings are per Channel"),
        (Int4Spec(group_size=48), "group_size of 16, 32, 64, 128 or 256, not 48"),
    ],
)
def test_embeddings_that_cannot_be_stored(table, message):
    layer = QLayerConfig(weight=table)
    with pytest.raises(ConfigError, match=rf"layer_type_config\[0\].*{message}"):
        QConfig(W4, layer_type_config={layer: ["Gather"]}, output_format="fake")
    with pytest.raises(ConfigError, match=rf"global_config.*{message}"):
        QConfig(layer, OpTypesToQuantize=["MatMul", "Gather"], output_format="fake")
    with_own_rule = QConfig(layer, {}, {W8: ["Gather"]}, output_format="fake")
    assert with_own_rule.layer_config_for("/embed", "Gather") == W8


def test_a_rule_by_name_is_for_a_linear_or_an_embedding():
    grouped = QLayerConfig(weight=Int4Spec(group_size=64))
    config = QConfig(W4A8, {grouped: ["/embed", "/head"]}, OpTypesToQuantize=["MatMul", "Gather"])
    assert config.layer_config_for("/embed", "Gather") == grouped
    with pytest.raises(ConfigError, match="node '/head' is a MatMul: w4a8 has a scale per channel; use"):
        config.layer_config_for("/head", "MatMul")


CONFIGS = [
    QConfig(W4A8, {W8: ["/head"]}, {QLayerConfig(weight=Int4Spec(group_size=32)): ["Gather"]}),
    QConfig(W4G, algo_config=[QuarotConfig(), GPTQConfig(4, act_order=True, static_groups=True)], accuracy_level=4),
    QConfig(W4, algo_config=[GPTQConfig(group_size=64, weight_symmetric=False)], output_format="fake"),
    QConfig(QLayerConfig(token(UInt4Spec, group_size=16, clip_ratio=0.9), Int3Spec()), algo_config=[QronosConfig()]),
    QConfig(W8, algo_config=[{"name": "gptaq", "alpha": 1.0, "per_channel": True}], output_format="W8"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trips(config, tmp_path):
    plain = config.to_dict()
    assert QConfig.from_dict(json.loads(json.dumps(plain))) == config
    for name in ("q.json", "q.yaml"):
        (config.to_json if name.endswith("json") else config.to_yaml)(tmp_path / name)
        found = QConfig.load(tmp_path / name)
        assert found == config
        assert (found.resolved_format, found.notes) == (config.resolved_format, config.notes)


def test_a_file_by_hand(tmp_path):
    path = tmp_path / "q.yaml"
    path.write_text(
        """
global_config:
  weight: {data_type: int4, group_size: 128}
layer_type_config:
  Gather: {weight: {data_type: int8, quant_granularity: per_channel}}
algo_config:
  - {name: quarot, use_random_had: true}
  - {name: gptaq, perc_damp: 0.05}
output_format: nbits
accuracy_level: 4
"""
    )
    config = QConfig.load(path)
    assert config.rounding.perc_damp == 0.05
    assert config.global_config.weight == Int4Spec(group_size=128)
    assert (config.resolved_format, config.accuracy_level) == ("nbits", 4)


def test_what_was_recorded_before_low_bits_still_loads():
    tensor = {
        "symmetric": True,
        "scale_type": "Float32",
        "calibration_method": "MinMax",
        "quant_granularity": "Token",
        "data_type": "UInt8",
        "percentile": 99.999,
    }
    weight = tensor | {"quant_granularity": "Channel", "data_type": "Int8"}
    config = QConfig.from_dict(
        {
            "global_config": {"activation": tensor, "weight": weight, "output_tensors": None},
            "specific_layer_config": [],
            "layer_type_config": [],
            "exclude": ["/lm_head"],
            "algo_config": [{"name": "quarot", "r_matrix_dim": None, "use_random_had": True, "seed": 7}],
            "use_external_data_format": False,
            "op_types_to_quantize": ["MatMul", "Gemm"],
            "nodes_to_quantize": [],
            "activation_symmetric": None,
            "weight_symmetric": None,
            "percentile": None,
            "weights_only": False,
            "calib_data_size": None,
            "ignored_options": ["MatMulNBitsParams"],
        }
    )
    assert not config.low_bit
    assert config.global_config == QLayerConfig(TOKEN, Int8Spec(quant_granularity="Channel"))
    assert config.quarot.seed == 7


@pytest.mark.parametrize(("group_size", "stored"), [(None, 2), (16, 4), (32, 2), (128, 2), (256, 4)])
def test_two_bits_at_level_4_are_told_as_they_are_written(group_size: int | None, stored: int) -> None:
    """onnxruntime multiplies 2-bit integers as they are in some blocks, and then they are stored so."""
    config = QConfig(QLayerConfig(weight=Int2Spec(group_size=group_size)), output_format="nbits", accuracy_level=4)
    assert blocked_bits(2, config.output_format, accuracy_level=4, block=group_size or 128) == stored
    notes = [note for note in config.notes if "stored in" in note]
    assert bool(notes) == (stored > 2)
