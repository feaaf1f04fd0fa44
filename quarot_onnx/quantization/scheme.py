"""On which grid a weight is rounded, and what rounding gives.

    q = clip(round(w / s) + z, q_min, q_max),    w ≈ s · (q - z)

Symmetric: z is the middle of the integers and s = max|w| / (2^(bits-1) - 1), so that the range of the largest weight is
met exactly and one more integer is left at its negative end (QuaRot's and GPTQ's convention). Asymmetric: the range
[min(w, 0), max(w, 0)] is spread over all 2^bits integers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.quantization.grids import Integers


@dataclass(frozen=True)
class WeightScheme:
    """A family of grids.

    Attributes:
        bits: 2 to 8.
        symmetric: Whether the zero point is the middle of the integers.
        signed: Integers from -2^(bits-1), or from 0.
        group_size: Consecutive input features that share a scale; None for all of them.
        per_channel: A scale for each output; False for one scale for the whole matrix (then without groups).
    """

    bits: int
    symmetric: bool = True
    signed: bool = True
    group_size: int | None = None
    per_channel: bool = True

    def __post_init__(self) -> None:
        """Check our own callers; users' values are checked by the configuration."""
        assert 2 <= self.bits <= 8, self.bits
        assert self.per_channel or self.group_size is None

    @property
    def low(self) -> int:
        """The smallest integer."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest integer."""
        return self.low + (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 0 if self.signed else 1 << (self.bits - 1)

    @property
    def dtype(self) -> type[np.int8] | type[np.uint8]:
        """The type of the integers."""
        return np.int8 if self.signed else np.uint8

    def groups(self, in_features: int) -> int:
        """The number of groups along the input; the last one may be shorter."""
        return 1 if self.group_size is None else -(-in_features // self.group_size)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A rounded weight.

    Attributes:
        scheme: Its family of grids.
        integers: [in, out], of ``scheme.dtype``.
        scale: float32 [groups, out], or [1, 1] where one scale serves the whole matrix.
        zero_point: Of the integers' type, the shape of ``scale``.
    """

    scheme: WeightScheme
    integers: Integers
    scale: NDArray[np.float32]
    zero_point: Integers

    def dequantized(self) -> NDArray[np.float32]:
        """The values s · (q - z), [in, out] float32, as onnxruntime's DequantizeLinear gives them."""
        size = self.scheme.group_size or len(self.integers)
        result = np.empty(self.integers.shape, np.float32)
        for group, (scale, zero) in enumerate(zip(self.scale, self.zero_point, strict=True)):
            rows = slice(group * size, (group + 1) * size)
            result[rows] = (self.integers[rows].astype(np.float32) - zero.astype(np.float32)) * scale
        return result
