"""Integers as com.microsoft.MatMulNBits and GatherBlockQuantized want them: unsigned, packed, with scales per block.

Both take the middle 2^(bits-1) of the stored integers for the zero point unless told otherwise. So a scheme's middle is
moved there, which changes no difference q - z; a 3-bit weight uses 8 of the 16 integers around 8.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.io.memory import large_array
from quarot_onnx.quantization.grids import Integers
from quarot_onnx.quantization.scheme import QuantizedWeight, WeightScheme
from quarot_onnx.rounding.store import RoundedWeight
from quarot_onnx.threads import spread

Bytes = NDArray[np.uint8]

_ROWS, _COLUMNS = 128, 512
"""Of a weight that are turned together, in a core's cache."""


def pack(integers: Bytes, bits: int) -> Bytes:
    """Several integers a byte, the first in the lowest bits.

    Args:
        integers: [..., n], each below 2^bits; n a multiple of 8 / bits.
        bits: 2, 4 or 8.

    Returns:
        [..., n · bits / 8].
    """
    if bits == 8:
        return np.ascontiguousarray(integers)
    per_byte = 8 // bits
    assert integers.shape[-1] % per_byte == 0, (integers.shape, bits)
    packed = integers[..., ::per_byte].copy(order="K")  # what lies side by side, stays so
    for place in range(1, per_byte):
        packed |= integers[..., place::per_byte] << np.uint8(place * bits)
    return packed


def unsigned(integers: Integers, scheme: WeightScheme, bits: int) -> Bytes:
    """Integers of a scheme, its middle moved to 2^(bits-1): the same shape."""
    shift = (1 << (bits - 1)) - scheme.middle
    # uint8 wraps around, which is what two's complement needs.
    return integers.view(np.uint8) + np.uint8(shift)


def packed_columns(weight: QuantizedWeight, block: int, bits: int) -> Bytes:
    """W of MatMulNBits.

    Args:
        weight: [in, out].
        block: Features per block.
        bits: Stored bits.

    Returns:
        [out, blocks, block · bits / 8]; past the last feature stands the zero point.
    """
    features, outputs = weight.integers.shape
    per_byte, blocks = 8 // bits, -(-features // block)
    packed = large_array((outputs, blocks * block // per_byte), np.uint8)
    beyond = unsigned(weight.zero_point[-1:], weight.scheme, bits)

    def turn(columns: slice) -> None:
        """Some outputs: a few rows are packed, then turned while they are in the cache."""
        for top in range(0, blocks * block, _ROWS):
            stop = min(top + _ROWS, blocks * block)
            some = unsigned(weight.integers[top:stop, columns], weight.scheme, bits)
            if stop > features:
                last = beyond[:, columns] if beyond.shape[1] > 1 else beyond
                filling = np.broadcast_to(last, (stop - top - len(some), some.shape[1]))
                some = np.concatenate([some, filling])
            packed[columns, top // per_byte : stop // per_byte] = pack(some.T, bits)

    spread(turn, [slice(left, left + _COLUMNS) for left in range(0, outputs, _COLUMNS)])
    return packed.reshape(outputs, blocks, block * bits // 8)


def packed_rows(weight: QuantizedWeight, bits: int) -> Bytes:
    """The table of GatherBlockQuantized: the transpose of [hidden, rows], [rows, hidden · bits / 8]."""
    return pack(np.ascontiguousarray(unsigned(weight.integers, weight.scheme, bits).T), bits)


def block_scales(weight: RoundedWeight, block: int) -> NDArray[np.float32]:
    """Scales, repeated for each block of a group: [out, blocks]."""
    return np.ascontiguousarray(_per_block(weight.grid().scale, weight, block))


def block_zero_points(weight: RoundedWeight, block: int, bits: int) -> Bytes:
    """Packed zero points, repeated for each block of a group: [out, ceil(blocks · bits / 8)]."""
    zeros = _per_block(unsigned(weight.grid().zero_point, weight.scheme, bits), weight, block)
    missing = -zeros.shape[1] % (8 // bits)
    return pack(np.pad(zeros, ((0, 0), (0, missing))), bits)


def packed_length(length: int, bits: int) -> int:
    """Bytes for ``length`` integers."""
    return -(-length * bits // 8)


def _per_block(array: NDArray[Any], weight: RoundedWeight, block: int) -> NDArray[Any]:
    """[groups, out] or [1, 1] as [out, blocks]."""
    features, outputs = weight.shape
    first = np.arange(0, features, block)
    group = first // weight.scheme.group_size if weight.scheme.group_size else np.zeros_like(first)
    return np.broadcast_to(array, (len(array), outputs))[group].T
