"""The rounding methods behind one door."""

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.calibration.hessian import Statistics
from quarot_onnx.choices import Method
from quarot_onnx.quantization.weights.gptaq import GptaqOptions, gptaq
from quarot_onnx.quantization.weights.gptq import gptq
from quarot_onnx.quantization.weights.qronos import QronosOptions, qronos
from quarot_onnx.quantization.weights.rtn import RtnOptions, round_to_nearest_weight
from quarot_onnx.quantization.weights.scheme import WeightScheme
from quarot_onnx.quantization.weights.solve import GptqOptions, Rounded

RoundingOptions = RtnOptions | GptqOptions
"""The options of a method; their type says which method."""


def method_of(options: RoundingOptions) -> Method:
    """The method that options belong to."""
    match options:
        case RtnOptions():
            return Method.RTN
        case GptaqOptions():
            return Method.GPTAQ
        case QronosOptions():
            return Method.QRONOS
        case GptqOptions():
            return Method.GPTQ


def needs_statistics(options: RoundingOptions) -> bool:
    """Whether the method wants H."""
    return method_of(options) is not Method.RTN


def needs_drift(options: RoundingOptions) -> bool:
    """Whether the method wants D, hence the float path beside the quantized one."""
    return method_of(options) in {Method.GPTAQ, Method.QRONOS}


def round_weight(
    weight: NDArray[np.floating],
    statistics: Statistics | None,
    scheme: WeightScheme,
    options: RoundingOptions,
    name: str,
) -> Rounded:
    """Round a weight with the method that the options belong to.

    Args:
        weight: W: [in, out].
        statistics: Of its inputs, as far as the method needs them.
        scheme: The family of grids.
        options: The method and its options.
        name: The Linear, for messages.

    Returns:
        The integers, their grid, and the damping that was used.

    Raises:
        ConfigError: act-order with groups whose grids are not static.
        ModelError: The weight holds NaN or infinity.
        CalibrationError: The statistics do, or the Hessian cannot be factorised.
    """
    if isinstance(options, RtnOptions):
        return Rounded(round_to_nearest_weight(weight, scheme, options.clip, name), 0.0)
    assert statistics is not None, name
    match options:
        case GptaqOptions():
            return gptaq(weight, statistics, scheme, options, name)
        case QronosOptions():
            return qronos(weight, statistics, scheme, options, name)
        case GptqOptions():
            return gptq(weight, statistics, scheme, options, name)
