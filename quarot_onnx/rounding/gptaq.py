"""GPTAQ, also GPTQv2 (Li et al. 2025, arXiv 2504.02692): GPTQ towards the float model's outputs.

    ||XW - X̃Q||²,    D = (X - X̃)ᵀX̃,    P = α · triu(D Uᵀ, 1) U

X are the inputs in the float model. When row i is rounded, the later rows also take over w_i (x_i - x̃_i), as far as
their inputs can express it: row i of P is α · D_{i,>i} (H_{>i,>i})⁻¹ (section 3). The paper has no α; the
authors' code takes 0.25.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.calibration.hessian import Statistics
from quarot_onnx.config.rounding import GPTAQConfig
from quarot_onnx.quantization.scheme import WeightScheme
from quarot_onnx.rounding.solve import Helpers, Rounded, pose, round_in_order
from quarot_onnx.threads import panels, spread

_PANEL = 256
"""Columns of P that one thread computes at a time."""


def gptaq(
    weight: NDArray[np.floating],
    statistics: Statistics,
    scheme: WeightScheme,
    options: GPTAQConfig,
    name: str,
    *,
    helpers: Helpers | None = None,
) -> Rounded:
    """Round a weight with GPTAQ.

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
    problem = pose(statistics, scheme, options, name)
    assert problem.drift is not None, name
    carried = _carried(problem.drift, problem.factors.inverse, options.alpha)
    return round_in_order(weight, replace(problem, drift=None, carried=carried), scheme, options, name, helpers=helpers)


def _carried(drift: NDArray[np.float64], factor: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """P, strictly upper triangular: what is zero in U and in P is left out, but for a panel on the diagonal."""
    size = len(drift)
    columns = panels(size, _PANEL)
    owed, carried = np.zeros_like(drift), np.zeros_like(drift)

    def owe(panel: slice) -> None:
        rows = drift[: panel.stop, panel.start :] @ factor[panel, panel.start :].T
        owed[: panel.stop, panel] = np.triu(rows, 1 - panel.start)

    def carry(panel: slice) -> None:
        part = owed[: panel.stop, : panel.stop] @ factor[: panel.stop, panel]
        carried[: panel.stop, panel] = np.multiply(part, alpha, out=part)

    spread(owe, columns)
    spread(carry, columns)
    return carried
