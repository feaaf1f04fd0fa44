"""In how many bits the integers of a Linear's weight are stored: what is written, and what users are told of it."""

from quarot_onnx.config.choices import OutputFormat

CHANNEL_BLOCK = 128
"""The block of MatMulNBits where a weight has one scale for each output."""

_FAST_2_BIT_BLOCKS = (32, 64, 128)


def stored_bits(bits: int, output_format: OutputFormat) -> int:
    """Bits that an integer takes in a format other than FAKE, where operators know 4 and 8."""
    return 8 if output_format is OutputFormat.W8 or bits > 4 else 4


def blocked_bits(bits: int, output_format: OutputFormat, *, accuracy_level: int | None, block: int) -> int:
    """Bits that an integer takes in MatMulNBits: 2 where onnxruntime multiplies them as they are, 4 or 8.

    With float32 activations, or in other blocks, it would unpack the whole 2-bit matrix in every call.
    """
    fast = accuracy_level == 4 and block in _FAST_2_BIT_BLOCKS
    narrow = output_format is OutputFormat.NBITS and bits == 2 and fast
    return 2 if narrow else stored_bits(bits, output_format)
