"""The integer types of quantized tensors, under AMD Quark's names."""

from quarot_onnx.quantization.config.enums import Choice


class DataType(Choice):
    """The type of a quantized tensor."""

    Int8 = "Int8"
    UInt8 = "UInt8"


Int8 = DataType.Int8
UInt8 = DataType.UInt8

__all__ = ["DataType", "Int8", "UInt8"]
