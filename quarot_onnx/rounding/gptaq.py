"""GPTAQ, also GPTQv2 (Li et al. 2025, arXiv 2504.02692): GPTQ towards the float model's outputs.

    ||XW - X̃Q||²,    D = (X - X̃)ᵀX̃,    P = α · triu(D Uᵀ, 1) U

X are the inputs in the float model. When row i is rounded, the later rows also take over w_i (x_i - x̃_i), as far as
their inputs can express it: row i of P is α · D_{i,>i} (H_{>i,>i})⁻¹ (section 3). The paper has no α; the
authors' code takes 0.25.
"""

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.calibration.hessian import Statistics
from quarot_onnx.config.rounding import GPTAQConfig
from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.rounding.solve import Rounded, pose, round_in_order


def gptaq(
    weight: NDArray[np.floating], statistics: Statistics, scheme: WeightScheme, options: GPTAQConfig, name: str
) -> Rounded:
    """Round a weight with GPTAQ.

    Args:
        weight: W: [in, out]; Linears that share their input can be stacked along ``out``, unless the scheme is
            per tensor.
        statistics: H and D of its inputs.
        scheme: The family of grids.
        options: Damping, order, groups, clip search and α.
        name: The Linear, for messages.

    Returns:
        The integers, their grid, and the damping that was used.

    Raises:
        ConfigError: act-order with groups whose grids are not static.
        ModelError: The weight holds NaN or infinity.
        CalibrationError: The statistics do, or H cannot be factorised.
    """
    problem = pose(statistics, scheme, options, name)
    assert problem.drift is not None, name
    inverse = problem.factors.inverse
    owed = problem.drift @ inverse.T
    for row in range(len(owed)):  # the strict upper triangle, in place: matrices are large
        owed[row, : row + 1] = 0.0
    carried = owed @ inverse
    carried *= options.alpha
    return round_in_order(weight, problem, scheme, options, name, carried=carried)
