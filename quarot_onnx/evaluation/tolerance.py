"""What may differ between two models that compute the same: the rounding of their weights' type."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True)
class Tolerance:
    """What may differ.

    Attributes:
        max_rel: Of the largest difference, relative to the largest logit.
        rel_l2: Of the relative L2 error.
        top1: Of the share of positions with the same most likely token, from below.
    """

    max_rel: float
    rel_l2: float
    top1: float = 0.999


# Some 12 roundings a layer in 30 layers add up like a random walk: an expected L2 error of sqrt(360) = 19 unit
# roundoffs (2^-24, 2^-11, 2^-8), 1.1e-6 in float32. One matrix off by 1 % moves the logits by 4e-4 or more. The limit
# for float32 is the geometric mean of the two, 2e-5, and in the same way 1e-4 for the largest difference, which lies
# up to eight times above the L2 error. In 16 bits noise and fault meet: the limits are about twice the expected noise
# for the L2 error and five times for the largest difference.
TOLERANCES = {
    ir.DataType.DOUBLE: Tolerance(max_rel=1e-4, rel_l2=2e-5),
    ir.DataType.FLOAT: Tolerance(max_rel=1e-4, rel_l2=2e-5),
    ir.DataType.FLOAT16: Tolerance(max_rel=5e-2, rel_l2=2e-2, top1=0.95),
    ir.DataType.BFLOAT16: Tolerance(max_rel=4e-1, rel_l2=1.6e-1, top1=0.8),
}


def coarsest(*dtypes: ir.DataType) -> ir.DataType:
    """The least precise of some float types."""
    return max(dtypes, key=list(TOLERANCES).index)


def coarser(dtype: ir.DataType, array: np.dtype[Any]) -> ir.DataType:
    """The less precise of a model's type and that of one of its outputs, which is rounded once more."""
    return coarsest(dtype, ir.DataType.FLOAT16) if array == np.float16 else dtype


def weight_type(model: ir.Model) -> ir.DataType:
    """The least precise float type among the weights of two or more dimensions, float32 without any.

    A few scales or tables in float16 do not make a float16 model: a type counts from a tenth of the float bytes on.
    """
    sizes: dict[ir.DataType, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in TOLERANCES and len(tensor.shape) >= 2:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    counted = [dtype for dtype, size in sizes.items() if 10 * size >= sum(sizes.values())]
    return coarsest(*counted) if counted else ir.DataType.FLOAT
