"""How the installed onnxruntime's own Python tools compute grids."""

import numpy as np
from onnxruntime.quantization.quant_utils import compute_scale_zp

SUBTRACTS_EXACTLY = compute_scale_zp(
    np.array(-1.0, np.float32),
    np.array(0.03641583397984505, np.float32),
    np.array(0, np.uint8),
    np.array(255, np.uint8),
)[1] == np.float32((1.0 + 0.03641583397984505) / 255)
"""Older versions of onnxruntime take max - min in float32: where that rounds, the scale is off by its last digit."""
