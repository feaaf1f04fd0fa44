"""The integer types of quantized tensors, under AMD Quark's names."""

from typing import Self

from quarot_onnx.config.choices import Choice


class DataType(Choice):
    """The type of a quantized tensor."""

    Int2 = "Int2"
    Int3 = "Int3"
    Int4 = "Int4"
    Int5 = "Int5"
    Int6 = "Int6"
    Int7 = "Int7"
    Int8 = "Int8"
    Int16 = "Int16"
    UInt2 = "UInt2"
    UInt3 = "UInt3"
    UInt4 = "UInt4"
    UInt5 = "UInt5"
    UInt6 = "UInt6"
    UInt7 = "UInt7"
    UInt8 = "UInt8"
    UInt16 = "UInt16"

    @classmethod
    def of(cls, bits: int, *, signed: bool) -> Self:
        """The type of a width.

        Args:
            bits: From 2 to 8, or 16.
            signed: Integers from -2^(bits-1), or from 0.

        Raises:
            ValueError: No type has so many bits.
        """
        found = next((item for item in cls if (item.bits, item.signed) == (bits, signed)), None)
        if found is None:
            raise ValueError(f"no type has {bits} bits; use 2 to 8, or 16")
        return found

    @property
    def bits(self) -> int:
        """Bits of an integer, 2 to 8, or 16."""
        return int(self.name.removeprefix("U").removeprefix("Int"))

    @property
    def signed(self) -> bool:
        """Whether the integers start from -2^(bits-1); otherwise from 0."""
        return not self.name.startswith("U")


Int2 = DataType.Int2
Int3 = DataType.Int3
Int4 = DataType.Int4
Int8 = DataType.Int8
UInt4 = DataType.UInt4
UInt8 = DataType.UInt8

__all__ = ["DataType", "Int2", "Int3", "Int4", "Int8", "UInt4", "UInt8"]
