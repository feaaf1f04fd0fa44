"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): rounding that makes ||X̃W - X̃Q||² small.

X̃ are the inputs that the Linear gets when everything before it is quantized; see ``solve.py`` for the recursion.
"""

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.calibration.hessian import Statistics
from quarot_onnx.config.rounding import GPTQConfig
from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.rounding.solve import Helpers, Rounded, pose, round_in_order


def gptq(
    weight: NDArray[np.floating],
    statistics: Statistics,
    scheme: WeightScheme,
    options: GPTQConfig,
    name: str,
    *,
    helpers: Helpers | None = None,
) -> Rounded:
    """Round a weight with GPTQ.

    Args:
        weight: W: [in, out]; Linears that share their input can be stacked along ``out``, unless the scheme is
            per tensor.
        statistics: H of its inputs.
        scheme: The family of grids.
        options: Damping, order, groups and clip search.
        name: The Linear, for messages.
        helpers: Who may round some of its columns.

    Returns:
        The integers, their grid, and the damping that was used.

    Raises:
        ConfigError: act-order with groups whose grids are not static.
        ModelError: The weight holds NaN or infinity.
        CalibrationError: The statistics do, or H cannot be factorised.
    """
    return round_in_order(weight, pose(statistics, scheme, options, name), scheme, options, name, helpers=helpers)
