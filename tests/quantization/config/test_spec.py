# ruff: noqa: FBT003 - positions are what is tested
import pytest

from quarot_onnx.config import (
    CalibMethod,
    DataType,
    Int8,
    Int8Spec,
    QLayerConfig,
    QTensorConfig,
    QuantGranularity,
    ScaleType,
    UInt8,
    UInt8Spec,
)
from quarot_onnx.errors import ConfigError


@pytest.mark.parametrize(("spec", "symmetric", "data_type"), [(Int8Spec(), True, Int8), (UInt8Spec(), False, UInt8)])
def test_defaults(spec, symmetric, data_type):
    assert spec.symmetric is symmetric
    assert spec.data_type is data_type
    assert spec.scale_type is ScaleType.Float32
    assert spec.calibration_method is CalibMethod.MinMax
    assert spec.quant_granularity is QuantGranularity.Tensor
    assert spec.percentile == 99.999


@pytest.mark.parametrize(
    ("keywords", "field", "member"),
    [
        ({"calibration_method": "minmax"}, "calibration_method", CalibMethod.MinMax),
        ({"calibration_method": "CalibMethod.Percentile"}, "calibration_method", CalibMethod.Percentile),
        ({"quant_granularity": "per_channel"}, "quant_granularity", QuantGranularity.Channel),
        ({"quant_granularity": "channel"}, "quant_granularity", QuantGranularity.Channel),
        ({"quant_granularity": "per-tensor"}, "quant_granularity", QuantGranularity.Tensor),
        ({"scale_type": "float32"}, "scale_type", ScaleType.Float32),
        ({"data_type": "int8"}, "data_type", DataType.Int8),
    ],
)
def test_strings_name_members(keywords, field, member):
    assert getattr(Int8Spec(**keywords), field) is member


@pytest.mark.parametrize("method", ["LayerwisePercentile", "Distribution"])
def test_calibration_methods_of_quark_that_are_not_supported(method):
    for spelling in (CalibMethod[method], method.lower()):
        with pytest.raises(ConfigError, match=rf"CalibMethod\.{method} is not supported; use MinMax or"):
            UInt8Spec(calibration_method=spelling)


@pytest.mark.parametrize("scale", [ScaleType.PowerOf2, ScaleType.Int16])
def test_scales_of_quark_that_are_not_supported(scale):
    with pytest.raises(ConfigError, match=f"{scale.name} is not supported; use Float32"):
        Int8Spec(scale_type=scale)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"symetric": True}, "unknown key 'symetric' .did you mean 'symmetric'"),
        ({"calibration_method": "minmx"}, "calibration_method='minmx'.*did you mean 'MinMax'"),
        ({"calibration_method": ScaleType.Float32}, "use MinMax or Percentile"),
        ({"symmetric": "yes"}, "symmetric='yes'"),
        ({"symmetric": 1}, "symmetric=1"),
        ({"data_type": UInt8}, "Int8Spec cannot hold UInt8; use UInt8Spec"),
        ({"data_type": "Int4"}, "Int8Spec cannot hold Int4; use Int4Spec"),
        ({"percentile": 0.99999}, "greater than 50"),
        ({"percentile": 100.1}, "less than or equal to 100"),
        ({"percentile": float("nan")}, "percentile=nan"),
    ],
)
def test_wrong_keywords_are_named(keywords, message):
    with pytest.raises(ConfigError, match=rf"^Int8Spec.*{message}") as caught:
        Int8Spec(**keywords)
    assert "\n" not in str(caught.value)


def test_the_base_class_is_refused():
    with pytest.raises(ConfigError, match="use Int8Spec or UInt8Spec"):
        QTensorConfig(symmetric=True, data_type="Int8")


def test_specs_are_frozen_values():
    assert Int8Spec() == Int8Spec() != UInt8Spec()
    assert len({Int8Spec(), Int8Spec(), UInt8Spec(), Int8Spec(symmetric=False)}) == 3
    with pytest.raises(Exception, match="frozen"):
        Int8Spec().symmetric = False


def test_activation_none_is_weight_only():
    layer = QLayerConfig(weight=Int8Spec(quant_granularity="channel"))
    assert layer.activation is None
    assert layer.output_tensors is None


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"activation": UInt8Spec()}, "weight is missing; give weight=Int8Spec"),
        ({}, "weight is missing"),
        ({"activation": UInt8Spec(), "input_tensors": UInt8Spec(), "weight": Int8Spec()}, "one and the same"),
        ({"activation": UInt8Spec(quant_granularity="channel"), "weight": Int8Spec()}, "activation.*per Tensor"),
        ({"weight": Int8Spec(), "output_tensors": UInt8Spec()}, "output_tensors without activation"),
        ({"weight": Int8Spec(), "bias": Int8Spec()}, "bias cannot be set"),
        ({"weight": Int8Spec}, r"write Int8Spec\(\)"),
        ({"weight": 8}, r"weight=8: not a tensor spec"),
        ({"weight": {"symmetric": True}}, "data_type is missing"),
        ({"wieght": Int8Spec()}, "unknown key 'wieght' .did you mean 'weight'"),
        ({"input_tensor": UInt8Spec(), "weight": Int8Spec()}, "did you mean 'input_tensors'"),
    ],
)
def test_wrong_layer_configs_are_named(keywords, message):
    with pytest.raises(ConfigError, match=rf"^QLayerConfig.*{message}"):
        QLayerConfig(**keywords)


def test_specs_by_name_and_by_mapping():
    layer = QLayerConfig(activation="uint8", weight={"data_type": "Int8", "quant_granularity": "channel"})
    assert layer == QLayerConfig(UInt8Spec(), Int8Spec(quant_granularity=QuantGranularity.Channel))


def test_output_tensors_is_the_asking():
    assert QLayerConfig(UInt8Spec(), Int8Spec(), output_tensors=UInt8Spec()).output_tensors == UInt8Spec()


def test_too_many_and_doubled_positions():
    with pytest.raises(ConfigError, match="6 positional arguments, at most 5"):
        Int8Spec(True, "Float32", "MinMax", "Tensor", "Int8", 99.0)
    with pytest.raises(ConfigError, match="symmetric given by position and by keyword"):
        Int8Spec(True, symmetric=True)
