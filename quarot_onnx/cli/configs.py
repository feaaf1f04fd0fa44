"""The options of the command line as configurations."""

from collections.abc import Iterable, Mapping

from quarot_onnx.cli.options import CalibrationChoice, Scheme
from quarot_onnx.cli.typed import Typed
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.config.choices import Precision, WeightType
from quarot_onnx.config.enums import CalibMethod, QuantGranularity
from quarot_onnx.config.spec import Int8Spec, QLayerConfig, QTensorConfig, UInt8Spec
from quarot_onnx.errors import ConfigError
from quarot_onnx.recipes.build import eight_bit_spec

_ROTATION = "rotation."


def quarot_config(typed: Mapping[str, Typed]) -> QuarotConfig:
    """The rotation options as a configuration."""
    given = {key.removeprefix(_ROTATION): item.value for key, item in typed.items() if key.startswith(_ROTATION)}
    return QuarotConfig(**given)


def scheme_config(
    scheme: Scheme,
    *,
    per_channel: bool,
    activation_symmetric: bool | None,
    weight_symmetric: bool,
    weight_type: WeightType | None,
    method: CalibrationChoice,
    percentile: float | None,
    head: Iterable[str],
    embedding: Precision,
    exclude: Iterable[str],
    rotation: QuarotConfig | None,
) -> QConfig:
    """The scheme options as a configuration.

    Raises:
        ConfigError: Options that contradict each other.
    """
    granularity = QuantGranularity.Channel if per_channel else QuantGranularity.Tensor
    activation: QTensorConfig | None = None
    if scheme is Scheme.W8A8_DYNAMIC:
        if activation_symmetric is False:
            raise ConfigError("--a-asym: per-token activations are symmetric; use --scheme w8a8-static or leave it out")
        activation = UInt8Spec(symmetric=True, quant_granularity=QuantGranularity.Token)
    elif scheme is Scheme.W8A8_STATIC:
        activation = _static_activation(symmetric=bool(activation_symmetric), method=method, percentile=percentile)
    elif activation_symmetric is not None:
        raise ConfigError("--a-sym/--a-asym: the scheme w8 leaves activations in float; leave it out")
    if percentile is not None and (scheme is not Scheme.W8A8_STATIC or method is not CalibrationChoice.PERCENTILE):
        raise ConfigError("--percentile needs --scheme w8a8-static and --calib-method percentile")
    weight = eight_bit_spec(weight_type, activation, symmetric=weight_symmetric, granularity=granularity)
    types = ["MatMul", "Gemm"]
    layer_types: dict[QLayerConfig, list[str]] = {}
    if embedding is Precision.INT8:
        types.append("Gather")
        # Rows are its channels. A Gather has no activation to quantize; naming it keeps the rule from overriding it.
        rows = Int8Spec(symmetric=weight_symmetric, quant_granularity=QuantGranularity.Channel)
        layer_types = {QLayerConfig(activation=activation, weight=rows): ["Gather"]}
    return QConfig(
        QLayerConfig(activation=activation, weight=weight),
        layer_type_config=layer_types,
        exclude=[*head, *exclude],
        algo_config=[] if rotation is None else [rotation],
        OpTypesToQuantize=types,
    )


def _static_activation(*, symmetric: bool, method: CalibrationChoice, percentile: float | None) -> UInt8Spec:
    found = CalibMethod.parse(str(method))
    if percentile is None:
        return UInt8Spec(symmetric=symmetric, calibration_method=found)
    return UInt8Spec(symmetric=symmetric, calibration_method=found, percentile=percentile)
