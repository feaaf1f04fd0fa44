# ruff: noqa: FBT003 - positions are what is tested
import pytest

from quarot_onnx.config import (
    GPTAQConfig,
    GPTQConfig,
    Int2Spec,
    Int4Spec,
    Int8Spec,
    QConfig,
    QLayerConfig,
    QronosConfig,
    QuantGranularity,
    QuarotConfig,
    RTNConfig,
    UInt8Spec,
)
from quarot_onnx.config.rounding import RoundingConfig
from quarot_onnx.errors import ConfigError

W4 = QLayerConfig(weight=Int4Spec())
ALL = [RTNConfig, GPTQConfig, GPTAQConfig, QronosConfig]
HESSIAN = ALL[1:]


@pytest.mark.parametrize(("owner", "name"), list(zip(ALL, ["rtn", "gptq", "gptaq", "qronos"], strict=True)))
def test_defaults(owner, name):
    config = owner()
    assert config.name == name
    assert config.mse is True
    assert (config.bits, config.group_size, config.per_channel, config.weight_symmetric) == (None,) * 4
    assert QConfig(W4, algo_config=[{"name": name}]).rounding == config


@pytest.mark.parametrize("owner", HESSIAN)
def test_positions_are_quarks(owner):
    config = owner(4, 64, -1, 0.05, True, True, False, False)
    assert config == owner(
        bits=4, block_size=64, perc_damp=0.05, act_order=True, per_channel=True, mse=False, weight_symmetric=False
    )
    assert config.group_size is None
    defaults = owner()
    assert (defaults.block_size, defaults.act_order, defaults.static_groups) == (128, False, False)
    assert defaults.perc_damp == (0.01 if owner is GPTQConfig else 0.1)


def test_what_each_needs():
    assert [owner().needs_statistics for owner in ALL] == [False, True, True, True]
    assert [owner().aq_calibration for owner in ALL] == [False, False, True, True]
    for owner in HESSIAN:
        assert owner(enable_aq_calibration=True).aq_calibration is True
        assert owner(enable_aq_calibration=False).aq_calibration is False
    assert GPTAQConfig().alpha == 0.25


@pytest.mark.parametrize(
    ("owner", "keywords", "message"),
    [
        (GPTQConfig, {"bits": 9}, "bits=9: weights have 2 to 8 bits"),
        (GPTQConfig, {"bits": 1}, "bits=1: weights have 2 to 8 bits"),
        (GPTQConfig, {"bits": "4"}, "bits='4': a whole number without quotes is wanted; write 4"),
        (GPTQConfig, {"perc_damp": "1e-2"}, "perc_damp='1e-2': a number without quotes is wanted; write 0.01 .YAML"),
        (GPTQConfig, {"perc_damp": "1e-8"}, r"write 1\.0e-08 "),
        (GPTQConfig, {"perc_damp": "little"}, "perc_damp='little': Input should be a valid number"),
        (GPTQConfig, {"block_size": "64"}, "block_size='64': a whole number without quotes is wanted; write 64"),
        (GPTQConfig, {"block_size": 64.0}, r"block_size=64\.0: a whole number is wanted; write 64"),
        (GPTQConfig, {"block_size": 0}, "block_size=0: .*greater than or equal to 1"),
        (GPTQConfig, {"group_size": 1}, "group_size=1: a group has 2 or more features"),
        (GPTQConfig, {"perc_damp": 0.0}, "perc_damp=0.0: .*greater than 0"),
        (GPTQConfig, {"perc_damp": 1.5}, "perc_damp=1.5: .*less than or equal to 1"),
        (GPTQConfig, {"mse": 1}, "mse=1"),
        (GPTQConfig, {"alpha": 1.0}, "unknown key 'alpha'"),
        (GPTQConfig, {"percdamp": 0.1}, "unknown key 'percdamp' .did you mean 'perc_damp'"),
        (GPTAQConfig, {"alpha": -0.1}, "alpha=-0.1: .*greater than or equal to 0"),
        (QronosConfig, {"name": "gptq"}, "name='gptq'"),
        (RTNConfig, {"block_size": 128}, "unknown key 'block_size'"),
        (GPTQConfig, {"per_channel": False, "group_size": 64}, "per_channel=False: groups of 64 lie within channels"),
        (
            GPTQConfig,
            {"act_order": True, "group_size": 64},
            "act_order=True: with groups of 64 it needs static groups; use static_groups=True",
        ),
    ],
)
def test_wrong_keywords_are_named(owner, keywords, message):
    with pytest.raises(ConfigError, match=rf"^{owner.__name__}.*{message}") as caught:
        owner(**keywords)
    assert "\n" not in str(caught.value)


def test_act_order_with_the_groups_of_a_spec():
    grouped = QLayerConfig(weight=Int4Spec(group_size=32))
    for arguments in ((grouped,), (QLayerConfig(weight=Int8Spec()), {grouped: ["/a"]})):
        with pytest.raises(
            ConfigError,
            match="groups of 32 it needs static groups; use static_groups=True, or leave out act_order",
        ):
            QConfig(*arguments, algo_config=[GPTQConfig(act_order=True)])
        assert QConfig(*arguments, algo_config=[GPTQConfig(act_order=True, static_groups=True)]).low_bit


@pytest.mark.parametrize(
    ("algorithms", "message"),
    [
        (
            [GPTQConfig(), QuarotConfig()],
            "the rounding stands too early; rotate, then smooth, then keep a prefix, then round",
        ),
        ([GPTQConfig(), RTNConfig()], "more than one rounding, gptq and rtn; give one of them"),
        ([QuarotConfig(), QuarotConfig(), GPTQConfig()], "more than one QuarotConfig; give one"),
        ([RoundingConfig(name="gptq")], "RoundingConfig is a base class; use GPTQConfig"),
        ([GPTQConfig], r"GPTQConfig is a class; write GPTQConfig\(\)"),
        ([{"name": "gptqq"}], "no algorithm is named 'gptqq' .did you mean 'gptq'"),
        ([{"name": "gptaq", "alpah": 1}], r"\[0\]: unknown key 'alpah' .did you mean 'alpha'"),
    ],
)
def test_order_and_number_of_algorithms(algorithms, message):
    with pytest.raises(ConfigError, match=rf"^QConfig\.algo_config.*{message}"):
        QConfig(W4, algo_config=algorithms)


def test_rotation_then_rounding():
    config = QConfig(W4, algo_config=[QuarotConfig(seed=3), QronosConfig(perc_damp=0.02)])
    assert config.quarot.seed == 3
    assert config.rounding == QronosConfig(perc_damp=0.02)
    assert QConfig(W4, algo_config=[QuarotConfig()]).rounding is None
    assert QConfig(W4, algo_config=[GPTQConfig()]).quarot is None


def test_an_algorithm_fills_in_what_the_spec_leaves_open():
    rule = {QLayerConfig(weight=Int8Spec()): ["/head"]}
    config = QConfig(W4, rule, algo_config=[GPTQConfig(4, group_size=64, weight_symmetric=False)])
    assert config.global_config.weight == Int4Spec(False, group_size=64)
    assert config.layer_config_for("/head", "MatMul").weight == Int8Spec()
    per_channel = QConfig(QLayerConfig(weight=Int8Spec()), algo_config=[GPTQConfig(per_channel=True)])
    assert per_channel.global_config.weight.quant_granularity is QuantGranularity.Channel
    per_tensor = QConfig(W4, algo_config=[RTNConfig(per_channel=False)])
    assert per_tensor.global_config.weight.quant_granularity is QuantGranularity.Tensor


def test_groups_lie_within_channels():
    grouped = QLayerConfig(weight=Int4Spec(group_size=64))
    assert QConfig(grouped, algo_config=[GPTQConfig(per_channel=True, group_size=64)]).global_config == grouped
    assert QConfig(grouped, algo_config=[GPTQConfig(group_size=-1)]).global_config == grouped


@pytest.mark.parametrize(
    ("weight", "keywords", "message"),
    [
        (Int8Spec(), {"bits": 4}, r"bits=4 of GPTQConfig contradicts weight=Int8Spec\(.*use weight=Int4Spec\("),
        (Int4Spec(group_size=128), {"group_size": 64}, "group_size=64 of GPTQConfig contradicts group_size=128"),
        (
            Int4Spec(quant_granularity="Channel"),
            {"group_size": 64},
            "group_size=64 of GPTQConfig contradicts quant_granularity=Channel of the weight in global_config",
        ),
        (
            Int4Spec(group_size=128),
            {"per_channel": False},
            "per_channel=False of GPTQConfig contradicts quant_granularity=Group",
        ),
        (
            Int4Spec(True),
            {"weight_symmetric": False},
            "weight_symmetric=False of GPTQConfig contradicts symmetric=True",
        ),
    ],
)
def test_an_algorithm_that_contradicts_the_spec(weight, keywords, message):
    with pytest.raises(ConfigError, match=rf"^QConfig: {message}"):
        QConfig(QLayerConfig(weight=weight), algo_config=[GPTQConfig(**keywords)])


def test_an_algorithm_that_repeats_the_spec():
    weight = Int2Spec(True, quant_granularity="Channel")
    algorithm = GPTQConfig(bits=2, per_channel=True, weight_symmetric=True)
    assert QConfig(QLayerConfig(weight=weight), algo_config=[algorithm]).global_config.weight == weight


def test_weight_symmetric_of_the_options_counts_as_set():
    with pytest.raises(ConfigError, match="weight_symmetric=True of GPTQConfig contradicts symmetric=False"):
        QConfig(W4, algo_config=[GPTQConfig(weight_symmetric=True)], WeightSymmetric=False)


def test_notes():
    without_use = GPTQConfig(enable_aq_calibration=True, static_groups=True)
    activation, groups = QConfig(W4, algo_config=[without_use]).notes
    assert activation == "enable_aq_calibration has no effect: no activation is quantized"
    assert groups == "static_groups has no effect: no weight has a group_size"
    with_use = QLayerConfig(UInt8Spec(True, quant_granularity="Token"), Int4Spec())
    assert QConfig(with_use, algo_config=[GPTQConfig(enable_aq_calibration=True)]).notes == ()
    (bits,) = QConfig(None, {W4: ["/a"]}, algo_config=[RTNConfig(bits=4)]).notes
    assert bits == "bits of rtn has no effect: there is no global_config, and rules keep their own specs"


def test_quarks_gptq_options_are_refused_by_name():
    for option in ("UseGPTQ", "GPTQParams"):
        with pytest.raises(ConfigError, match=rf"{option}=.* is not supported: use algo_config=\[GPTQConfig"):
            QConfig(W4, extra_options={option: {"Bits": 4}})
    assert QConfig(W4, UseGPTQ=False, GPTQParams={}) == QConfig(W4)
    with pytest.raises(ConfigError, match="use output_format='nbits'"):
        QConfig(W4, UseMatMulNBits=True)
