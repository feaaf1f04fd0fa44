# ruff: noqa: FBT003 - positions are what is tested
import pytest

import quarot_onnx
from quarot_onnx import config as package
from quarot_onnx.config import (
    DataType,
    Int2Spec,
    Int3Spec,
    Int4Spec,
    Int6Spec,
    Int8Spec,
    QLayerConfig,
    QuantGranularity,
    UInt4Spec,
    UInt5Spec,
    UInt8Spec,
    spec_class,
)
from quarot_onnx.errors import ConfigError


def test_every_width_exists_signed_and_unsigned():
    assert {(item.bits, item.signed) for item in DataType} == {
        (bits, signed) for bits in (*range(2, 9), 16) for signed in (True, False)
    }
    assert len(DataType) == 16


@pytest.mark.parametrize("data_type", list(DataType))
def test_every_type_has_its_spec(data_type):
    owner = spec_class(data_type)
    spec = owner()
    assert owner.__name__ == f"{data_type.name}Spec"
    assert getattr(package, owner.__name__) is owner
    assert owner.__doc__
    assert (spec.data_type, spec.bits, spec.symmetric) == (data_type, data_type.bits, data_type.signed)
    assert DataType.of(data_type.bits, signed=data_type.signed) is data_type
    low = QuantGranularity.Channel if data_type.bits < 8 else QuantGranularity.Tensor
    assert (spec.quant_granularity, spec.group_size, spec.clip_ratio) == (low, None, 1.0)


def test_no_such_width():
    with pytest.raises(ValueError, match="no type has 9 bits; use 2 to 8"):
        DataType.of(9, signed=True)


def test_public_names():
    for name in ("Int2Spec", "Int3Spec", "Int4Spec", "UInt4Spec", "GPTQConfig", "GPTAQConfig", "QronosConfig"):
        assert name in quarot_onnx.__all__
        assert getattr(quarot_onnx, name) is getattr(package, name)
    for name in quarot_onnx.__all__:
        assert getattr(quarot_onnx, name).__name__ == name


@pytest.mark.parametrize("owner", [Int2Spec, Int3Spec, Int4Spec, UInt4Spec, Int8Spec])
def test_a_group_size_asks_for_groups(owner):
    assert owner(group_size=128).quant_granularity is QuantGranularity.Group
    assert owner(group_size=128) == owner(quant_granularity="per_group", group_size=128)
    assert QLayerConfig(weight=owner(group_size=128)).weight.group_size == 128


def test_quarks_minus_one_is_no_group():
    assert Int4Spec(group_size=-1) == Int4Spec(group_size=None) == Int4Spec()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"group_size": 1}, "group_size=1: a group has 2 or more features; use -1, or leave it out, to have no groups"),
        ({"group_size": 0}, "group_size=0: a group has 2 or more"),
        ({"group_size": -2}, "group_size=-2: a group has 2 or more"),
        ({"group_size": 32.0}, r"group_size=32\.0: a whole number is wanted; write 32"),
        ({"group_size": "32"}, "group_size='32': a whole number without quotes is wanted; write 32"),
        ({"group_size": "many"}, "group_size='many': a group has 2 or more"),
        ({"group_size": True}, "group_size=True: a group has 2 or more"),
        ({"quant_granularity": "Group"}, "quant_granularity=Group needs a group_size; give group_size=128"),
        ({"quant_granularity": "Channel", "group_size": 32}, "group_size=32 contradicts quant_granularity=Channel"),
        ({"quant_granularity": "Tensor", "group_size": 32}, "group_size=32 contradicts quant_granularity=Tensor"),
        ({"clip_ratio": 0.0}, "clip_ratio=0.0: .*greater than 0"),
        ({"clip_ratio": 1.1}, "clip_ratio=1.1: .*less than or equal to 1"),
        ({"clip_ratio": float("nan")}, "clip_ratio=nan"),
        ({"group_sise": 32}, "unknown key 'group_sise' .did you mean 'group_size'"),
        ({"data_type": "Int8"}, "Int4Spec cannot hold Int8; use Int8Spec"),
        ({"data_type": "Int9"}, "no DataType has this name; use Int2 or Int3"),
    ],
)
def test_wrong_keywords_are_named(keywords, message):
    with pytest.raises(ConfigError, match=rf"^Int4Spec.*{message}") as caught:
        Int4Spec(**keywords)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"weight": Int4Spec(quant_granularity="Token")}, "weight: .*Token is for activations; use Channel, Group"),
        ({"weight": Int4Spec(clip_ratio=0.9)}, "weight: clip_ratio=0.9 is for activations"),
        (
            {"activation": Int4Spec(), "weight": Int4Spec()},
            r"quantized per Token, or static per Tensor; use Int4Spec\(.*'Token'\) or Int4Spec\(.*'Tensor'\)",
        ),
        (
            {"activation": Int4Spec(group_size=64), "weight": Int4Spec()},
            r"within a token; use Int4Spec\(quant_granularity='Token', group_size=64\)",
        ),
        (
            {"activation": UInt8Spec(group_size=64), "weight": Int4Spec()},
            r"within a token; use UInt8Spec\(quant_granularity='Token', group_size=64\)",
        ),
        (
            {"activation": UInt8Spec(), "weight": Int8Spec(), "output_tensors": Int4Spec()},
            "output_tensors: outputs have 8 bits, not 4; use UInt8Spec",
        ),
        (
            {"activation": UInt8Spec(), "weight": Int8Spec(), "output_tensors": UInt8Spec(clip_ratio=0.9)},
            "output_tensors: clip_ratio=0.9 is for inputs",
        ),
        (
            {
                "activation": UInt8Spec(True, quant_granularity="Token"),
                "weight": Int8Spec(),
                "output_tensors": UInt8Spec(),
            },
            "output_tensors with a per-Token activation",
        ),
    ],
)
def test_wrong_layer_configs_are_named(keywords, message):
    with pytest.raises(ConfigError, match=rf"^QLayerConfig.*{message}"):
        QLayerConfig(**keywords)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("owner", [Int2Spec, UInt5Spec, UInt8Spec])
def test_per_token_activations_of_any_width(owner, group_size, symmetric):
    spec = owner(symmetric, quant_granularity="per_token", group_size=group_size, clip_ratio=0.9)
    assert QLayerConfig(spec, Int4Spec()).activation == spec
    assert spec.quant_granularity is QuantGranularity.Token


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("owner", [Int2Spec, Int6Spec, UInt5Spec, UInt8Spec])
def test_static_activations_of_any_width(owner, symmetric):
    spec = owner(symmetric, quant_granularity="per_tensor", calibration_method="Percentile", clip_ratio=0.9)
    assert QLayerConfig(spec, Int4Spec()).activation == spec
    assert spec.quant_granularity is QuantGranularity.Tensor


def test_specs_by_name_and_by_mapping():
    layer = QLayerConfig("uint8", {"data_type": "int4", "group_size": 32})
    assert layer == QLayerConfig(UInt8Spec(), Int4Spec(group_size=32))
    assert QLayerConfig(weight="int4").weight == Int4Spec()
