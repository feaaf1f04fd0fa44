"""Rounded weights made up for tests, and how to read back what a file holds of them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from quarot_onnx.quantization.grids import Grid
from quarot_onnx.quantization.scheme import QuantizedWeight, WeightScheme
from quarot_onnx.rounding.rtn import round_to_nearest_weight
from quarot_onnx.rounding.store import RoundedWeight


def quantized(shape: tuple[int, int], scheme: WeightScheme, seed: int = 0) -> QuantizedWeight:
    """Integers over the whole range, scales of very different size, zero points anywhere unless symmetric."""
    rng = np.random.default_rng(seed)
    features, outputs = shape
    grids = (scheme.groups(features), outputs) if scheme.per_channel else (1, 1)
    integers = rng.integers(scheme.low, scheme.high + 1, shape).astype(scheme.dtype)
    scale = np.exp(rng.uniform(-4, 0, grids)).astype(np.float32)
    zero = np.full(grids, scheme.middle) if scheme.symmetric else rng.integers(scheme.low, scheme.high + 1, grids)
    return QuantizedWeight(scheme, integers, scale, zero.astype(scheme.dtype))


def rounded(weight: QuantizedWeight) -> RoundedWeight:
    """A weight as the store gives it back."""
    features, outputs = weight.integers.shape
    grid = Grid(weight.scale, weight.zero_point)
    return RoundedWeight(weight.scheme, (features, outputs), lambda: grid, lambda: weight)


def nearest(weight: NDArray[Any], scheme: WeightScheme) -> RoundedWeight:
    """A weight to nearest, on the grid of its true range."""
    return rounded(round_to_nearest_weight(weight, scheme, "W", clip=False))


def initializer(path: Path, suffix: str) -> NDArray[Any]:
    """The only initializer of a file whose name ends so; 4-bit ones come as one element each."""
    found = [tensor for tensor in onnx.load(path).graph.initializer if tensor.name.endswith(suffix)]
    assert len(found) == 1, [tensor.name for tensor in onnx.load(path).graph.initializer]
    return numpy_helper.to_array(found[0])


def unpacked(array: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The integers of packed bytes, the lowest bits first, along the last axis."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (array[..., None] >> shifts & (2**bits - 1)).reshape(*array.shape[:-1], -1)
