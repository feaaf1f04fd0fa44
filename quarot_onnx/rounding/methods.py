"""The rounding methods behind one door: each configuration with the function that does what it says."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.calibration.hessian import Statistics
from quarot_onnx.config.rounding import GPTAQConfig, GPTQConfig, QronosConfig, RoundingConfig, RTNConfig
from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.rounding.gptaq import gptaq
from quarot_onnx.rounding.gptq import gptq
from quarot_onnx.rounding.qronos import qronos
from quarot_onnx.rounding.rtn import round_to_nearest_weight
from quarot_onnx.rounding.solve import Helpers, Rounded

METHODS: Mapping[type[RoundingConfig], Callable[..., Rounded]]
METHODS = MappingProxyType({GPTQConfig: gptq, GPTAQConfig: gptaq, QronosConfig: qronos})
"""The methods that want statistics, by the type of their configuration."""


def round_weight(
    weight: NDArray[np.floating],
    statistics: Statistics | None,
    scheme: WeightScheme,
    config: RoundingConfig,
    name: str,
    *,
    helpers: Helpers | None = None,
) -> Rounded:
    """Round a weight with the method that the configuration belongs to.

    Args:
        weight: W: [in, out].
        statistics: Of its inputs, as far as the method needs them.
        scheme: The family of grids.
        config: The method and its options; its grid (``bits`` and the like) is not looked at, ``scheme`` is.
        name: The Linear, for messages.
        helpers: Who may do some of it, where a method wants statistics.

    Returns:
        The integers, their grid, and the damping that was used.

    Raises:
        ConfigError: act-order with groups whose grids are not static.
        ModelError: The weight holds NaN or infinity.
        CalibrationError: The statistics do, or the Hessian cannot be factorised.
    """
    if isinstance(config, RTNConfig):
        return Rounded(round_to_nearest_weight(weight, scheme, name, clip=config.mse), 0.0)
    assert statistics is not None, name
    return METHODS[type(config)](weight, statistics, scheme, config, name, helpers=helpers)
