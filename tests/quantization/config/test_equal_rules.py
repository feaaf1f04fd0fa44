"""Two rules with equal configurations are two rules, as with AMD Quark's configurations, which hash by identity."""

import exports
import pytest

from quarot_onnx.config import Int8Spec, QConfig, QLayerConfig, UInt8Spec
from quarot_onnx.io import model_io
from quarot_onnx.quantization.select import select
from quarot_onnx.sites.detect import Survey

W8A8 = QLayerConfig(UInt8Spec(), Int8Spec())
A, B = (f"/model/layers.{i}/mlp/down_proj/MatMul" for i in (0, 1))


def weight_only() -> QLayerConfig:
    return QLayerConfig(weight=Int8Spec())


def both() -> QConfig:
    return QConfig(W8A8, specific_layer_config={weight_only(): [A], weight_only(): [B]})


def test_rules_by_node_both_hold():
    config = both()
    assert [rule.layers for rule in config.specific_layer_config] == [(A,), (B,)]
    chosen = {
        job.linear.name: job.config
        for job in select(Survey(model_io.load(exports.optimum_export("llama"))), config).linears
    }
    assert chosen[A] == chosen[B] == weight_only()


def test_rules_by_type_both_hold():
    rules = {weight_only(): ["MatMul"], QLayerConfig(weight=Int8Spec()): ["Gather"]}
    config = QConfig(W8A8, layer_type_config=rules, OpTypesToQuantize=["MatMul", "Gemm", "Gather"])
    assert config.layer_config_for("/a", "MatMul") == config.layer_config_for("/b", "Gather") == weight_only()
    assert config.layer_config_for("/c", "Gemm") == W8A8


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_they_survive_a_file(tmp_path, suffix):
    path = tmp_path / f"config.{suffix}"
    getattr(both(), f"to_{suffix}")(path)
    again = QConfig.load(path)
    assert again == both()
    assert [rule.layers for rule in again.specific_layer_config] == [(A,), (B,)]


def test_three_rules_one_of_them_float():
    config = QConfig(W8A8, specific_layer_config={weight_only(): ["/a"], None: ["/b"], weight_only(): ["/c"]})
    assert [config.layer_config_for(name, "MatMul") for name in ("/a", "/b", "/c")] == [
        weight_only(),
        None,
        weight_only(),
    ]


def test_equality_is_by_content_as_before():
    assert weight_only() == weight_only()
    assert len({weight_only(), weight_only()}) == 2
    assert both() == both() == QConfig(W8A8, specific_layer_config=[(weight_only(), [A]), (weight_only(), [B])])
    assert hash(both()) == hash(both()), "what is equal, and no key of a rule table, hashes alike"
    assert hash(both().specific_layer_config[0]) == hash(both().specific_layer_config[0])
