"""Qronos (Zhang et al. 2025, arXiv 2505.11695): first correct for everything before the Linear, then diffuse errors.

    q_1 = Q((G_1 w - H_{1,≥2} w_{≥2}) / H_11),    w_{≥2} ← (H_{≥2,≥2})⁻¹ (G_{≥2} w - H_{≥2,1} q_1),    then GPTQ

with G = X̃ᵀX = H + Dᵀ, and λ on the diagonals of both H and G. λ stands on both sides, so that with c = Dᵀw these are

    q_1 = Q(w_1 + c_1 / H_11),    w_{≥2} ← w_{≥2} + (H_{≥2,≥2})⁻¹ (H_{≥2,1} (w_1 - q_1) + c_{≥2})

in which nothing large is subtracted from anything large. GPTQ's own first step, from w', gives the same where

    w'_1 = w_1 + c_1 / H_11,    w'_{≥2} = w_{≥2} + (H_{≥2,≥2})⁻¹ (c_{≥2} - H_{≥2,1} c_1 / H_11)

so Qronos is GPTQ on w'. The paper takes w' whole. It is a regression on the inputs of few calibration tokens: it fits
their noise, and it shrinks what quantized activations blur, layer after layer. A part α of w' - w is better on held-out
text, and far better on text of another kind (docs/accuracy.md).

The systems are solved with the factor of the inverse that rounding needs anyway (:mod:`.correcting`). The grids, too,
are those of w', which is what is rounded: on correlated random inputs with a drift of 5 % to 30 %, ||XW - X̃Q|| was 1 %
to 3 % smaller with them than with the grids of W at 4 bits and clip search, 1 % to 6 % at 3 bits, the same at 8.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.calibration.hessian import Statistics
from quarot_onnx.config.rounding import QronosConfig
from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.rounding.grids import require_finite
from quarot_onnx.rounding.solve import Helpers, Rounded, pose, round_in_order


def qronos(
    weight: NDArray[np.floating],
    statistics: Statistics,
    scheme: WeightScheme,
    options: QronosConfig,
    name: str,
    *,
    helpers: Helpers | None = None,
) -> Rounded:
    """Round a weight with Qronos.

    Args:
        weight: W: [in, out]; Linears that share their input can be stacked along ``out``, unless the scheme is
            per tensor.
        statistics: H and D of its inputs.
        scheme: The family of grids.
        options: Damping, order, groups, clip search and α.
        name: The Linear, for messages.
        helpers: Who may round some of its columns.

    Returns:
        The integers, their grid, and the damping that was used.

    Raises:
        ConfigError: act-order with groups whose grids are not static.
        ModelError: The weight holds NaN or infinity.
        CalibrationError: The statistics do, or H cannot be factorised.
    """
    require_finite(weight, name)
    problem = replace(pose(statistics, scheme, options, name), alpha=options.alpha)
    return round_in_order(weight, problem, scheme, options, name, helpers=helpers)
