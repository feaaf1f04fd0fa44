"""In which form a rounded weight is stored."""

from dataclasses import dataclass

from quarot_onnx.config.choices import OutputFormat
from quarot_onnx.config.storage import stored_bits
from quarot_onnx.rounding.store import RoundedWeight

MAX_BLOCK = 256
"""The largest block of MatMulNBits that onnxruntime has fast kernels for."""


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A rounded weight and how it is written.

    Attributes:
        rounded: The integers of alpha · W: [in, out]; of a table's transpose, [hidden, rows].
        format: The form of storage.
        accuracy_level: That of MatMulNBits: 4 rounds activations to 8 bits per block, 1 keeps them float32; None
            leaves it to onnxruntime, which keeps them.
    """

    rounded: RoundedWeight
    format: OutputFormat
    accuracy_level: int | None = None

    @property
    def in_features(self) -> int:
        """The length of the axis that groups run along."""
        return self.rounded.shape[0]

    @property
    def grouped(self) -> bool:
        """Whether an output has more than one scale."""
        return self.rounded.scheme.groups(self.in_features) > 1

    @property
    def stored_bits(self) -> int:
        """Bits an integer: 4 or 8."""
        return stored_bits(self.rounded.scheme.bits, self.format)

    def block_size(self, default: int) -> int:
        """Features per scale in MatMulNBits and GatherBlockQuantized: the largest block that a group is made of.

        Args:
            default: The block for scales per channel, a power of 2 from 16 on.
        """
        group = self.rounded.scheme.group_size if self.grouped else None
        block = default if group is None else min(group & -group, MAX_BLOCK)
        assert block >= 16, group
        return block


def power_of_two(least: int) -> int:
    """The smallest block of at least ``least``."""
    return max(16, 1 << (least - 1).bit_length())
