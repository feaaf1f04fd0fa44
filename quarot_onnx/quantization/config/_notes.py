"""What a user should know about a configuration that is right but does not do all that it seems to say."""

from collections.abc import Sequence

from quarot_onnx.quantization.config._options import IGNORED
from quarot_onnx.quantization.config.data_type import DataType
from quarot_onnx.quantization.config.enums import CalibMethod, QuantGranularity
from quarot_onnx.quantization.config.spec import QLayerConfig


def notes(
    ignored: Sequence[str],
    global_config: QLayerConfig | None,
    others: Sequence[QLayerConfig | None],
    percentile: float | None,
) -> tuple[str, ...]:
    """The notes on a configuration, a sentence each.

    Args:
        ignored: Names of options that change nothing here.
        global_config: The global layer configuration.
        others: The configurations of all rules.
        percentile: The value of the option Percentile.
    """
    configs = [config for config in (global_config, *others) if config is not None]
    activations = [config.activation for config in configs if config.activation is not None]
    found = [f"{name} has no effect: {IGNORED[name]}" for name in ignored]
    # Per token, integers are uint8 around 128 whatever the type is called: the same values.
    static = [spec for spec in activations if spec.quant_granularity is not QuantGranularity.Token]
    if any(spec.data_type is DataType.Int8 for spec in static):
        found.append("int8 activations run several times slower than uint8 on onnxruntime's CPU; use UInt8Spec")
    if any(config.weight.calibration_method is not CalibMethod.MinMax for config in configs):
        found.append("the calibration method of a weight has no effect: weights take their true range")
    if percentile is not None and all(spec.calibration_method is not CalibMethod.Percentile for spec in activations):
        found.append("Percentile has no effect: no activation is calibrated by Percentile")
    quantizes_activations = global_config is not None and global_config.activation is not None
    if quantizes_activations and any(config is not None and config.activation is None for config in others):
        found.append("a rule without activation quantizes the weight only; it does not inherit the global activation")
    return tuple(found)
