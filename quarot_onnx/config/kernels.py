"""What onnxruntime's kernels make of a configuration: where products saturate, are slow, or round activations."""

from quarot_onnx.config.choices import OutputFormat
from quarot_onnx.config.data_type import DataType
from quarot_onnx.config.spec import QLayerConfig


def saturable(config: QLayerConfig, output_format: OutputFormat) -> bool:
    """Whether products saturate on processors without VNNI: those of int8 weights of 8 bits and uint8 activations.

    Args:
        config: How a Linear is quantized.
        output_format: As `resolved` has it.
    """
    return _beside_uint8(config, output_format) is DataType.Int8


def widened(config: QLayerConfig, output_format: OutputFormat) -> bool:
    """Whether products are exact on all processors, but slower without VNNI: those of uint8 weights of 8 bits.

    Args:
        config: How a Linear is quantized.
        output_format: As `resolved` has it.
    """
    return _beside_uint8(config, output_format) is DataType.UInt8


def _beside_uint8(config: QLayerConfig, output_format: OutputFormat) -> DataType | None:
    """The type of the weights that onnxruntime multiplies with uint8 activations; None where it does not."""
    weight, activation = config.weight, config.activation
    if (
        output_format in {OutputFormat.NBITS, OutputFormat.FAKE}
        or weight is None
        or activation is None
        or activation.bits > 8
    ):
        return None
    # Per token, activations are uint8 around 128 whatever the type is called.
    unsigned = not activation.has_fixed_scale or not activation.data_type.signed
    return weight.data_type if unsigned else None


def blocked_at_8_bits(config: QLayerConfig, output_format: OutputFormat) -> bool:
    """Whether a Linear runs as MatMulNBits of 8 bits, which rounds activations to 8 bits per block of a row."""
    weight = config.weight
    if weight is None or config.activation is not None:
        return False
    return weight.bits > 4 and output_format is not OutputFormat.FAKE
