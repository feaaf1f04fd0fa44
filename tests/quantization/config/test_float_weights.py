"""Configurations that quantize activations and leave weights in float."""

import pytest

from quarot_onnx.config import (
    GPTAQConfig,
    GPTQConfig,
    Int4Spec,
    Int8Spec,
    OutputFormat,
    QConfig,
    QLayerConfig,
    QuarotConfig,
    RTNConfig,
    UInt4Spec,
    UInt8Spec,
)
from quarot_onnx.errors import ConfigError

TOKEN = UInt4Spec(quant_granularity="Token")
A4 = QLayerConfig(activation=TOKEN, weight=None)
A4_STATIC = QLayerConfig(UInt4Spec(quant_granularity="Tensor"), None)
A8 = QLayerConfig(UInt8Spec(symmetric=True, quant_granularity="Token"), None)
W4A8 = QLayerConfig(UInt8Spec(symmetric=True, quant_granularity="Token"), Int4Spec())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"activation": TOKEN}, "weight is missing; give weight=Int8Spec"),
        ({"weight": None}, "weight is missing"),
        ({"activation": None, "weight": None}, "weight is missing"),
        ({"activation": UInt8Spec(), "weight": None, "output_tensors": UInt8Spec()}, "output_tensors with a weight in"),
        ({"activation": TOKEN, "wieght": None}, "unknown key 'wieght' .did you mean 'weight'"),
    ],
)
def test_none_must_be_said_and_leave_something(keywords, message):
    with pytest.raises(ConfigError, match=rf"^QLayerConfig.*{message}"):
        QLayerConfig(**keywords)


@pytest.mark.parametrize("layer", [A4, A4_STATIC, A8, QLayerConfig(UInt8Spec(), None)])
def test_only_fake_holds_them(layer):
    chosen = QConfig(layer)
    assert chosen.resolved_format is OutputFormat.FAKE
    assert chosen.low_bit
    assert chosen.notes == (
        "the format fake was chosen, as weights stay in float: float32 for studies, no smaller and no faster",
    )
    assert QConfig(layer, output_format="fake").notes == ()
    for other in ("w4a8", "w8", "nbits"):
        with pytest.raises(ConfigError, match=rf"output_format={other} .*weight=None: .*use output_format='fake'"):
            QConfig(layer, output_format=other)


def test_other_formats_refuse_rules_too():
    assert QConfig(W4A8, {A8: ["/a"]}, output_format="fake").layer_config_for("/a", "MatMul") == A8
    with pytest.raises(
        ConfigError, match=r"w4a8 \(chosen for global_config\) does not take specific_layer_config\[0\]"
    ):
        QConfig(W4A8, {A8: ["/a"]})


@pytest.mark.parametrize("rounding", [RTNConfig(), GPTQConfig(), GPTAQConfig()])
def test_a_rounding_needs_a_weight(rounding):
    for rules in ({}, {A8: ["/a"]}):
        with pytest.raises(ConfigError, match=rf"^QConfig: {rounding.name} has nothing to round: .*leave it out"):
            QConfig(A4, rules, algo_config=[QuarotConfig(), rounding])
    for rules in ({"specific_layer_config": {W4A8: ["/a"]}}, {"layer_type_config": {W4A8: ["Gemm"]}}):
        assert QConfig(A4, **rules, algo_config=[rounding], output_format="fake").rounding == rounding


def test_a_grid_that_no_weight_has():
    grouped = QLayerConfig(TOKEN, Int4Spec(group_size=32))
    config = QConfig(A4, {grouped: ["/a"]}, algo_config=[GPTQConfig(4, group_size=64)], output_format="fake")
    assert config.global_config == A4
    reason = "of gptq has no effect: global_config leaves weights in float, and rules keep their own specs"
    assert config.notes == (f"bits {reason}", f"group_size {reason}")
    aware = QConfig(A4, {W4A8: ["/a"]}, algo_config=[GPTAQConfig()], output_format="fake")
    assert aware.notes == (
        "while weights are rounded, inputs of Linears whose weights stay in float are not quantized",
    )
    with pytest.raises(ConfigError, match="groups of 32 it needs static groups"):
        QConfig(A4, {grouped: ["/a"]}, algo_config=[GPTQConfig(act_order=True)])


def test_options():
    assert QConfig(A4, WeightSymmetric=True, ActivationSymmetric=True).global_config == QLayerConfig(
        UInt4Spec(quant_granularity="Token", symmetric=True), None
    )
    with pytest.raises(ConfigError, match="WeightsOnly=True leaves nothing to quantize of a config with weight=None"):
        QConfig(A4, WeightsOnly=True)


def test_embeddings_need_a_weight():
    types = ["MatMul", "Gather"]
    with pytest.raises(
        ConfigError,
        match=r"weight=None: embeddings have no activation to quantize; use layer_type_config=.*, or leave out Gather",
    ):
        QConfig(A4, OpTypesToQuantize=types)
    table = QLayerConfig(weight=Int8Spec())
    config = QConfig(A4, {A4: ["/embed"]}, {table: ["Gather"]}, OpTypesToQuantize=types, output_format="fake")
    assert config.layer_config_for("/other", "Gather") == table
    with pytest.raises(ConfigError, match="node '/embed' is a Gather: embeddings have no activation"):
        config.layer_config_for("/embed", "Gather")


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_round_trip(tmp_path, suffix):
    config = QConfig(A4_STATIC, {A4: ["/b"], W4A8: ["/a"]}, algo_config=[GPTQConfig()], output_format="fake")
    data = config.to_dict()
    assert data["global_config"]["weight"] is None
    assert QConfig.from_dict(data) == config
    path = tmp_path / f"q.{suffix}"
    getattr(config, f"to_{suffix}")(path)
    assert QConfig.load(path) == config
