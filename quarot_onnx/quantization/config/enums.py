"""The choices that a configuration offers, under AMD Quark's names.

Members that Quark knows and this package does not implement exist, so that they can be refused by name with the way
out instead of with an AttributeError.
"""

from enum import StrEnum
from typing import Self

from quarot_onnx.errors import did_you_mean


class Choice(StrEnum):
    """An enum that is also written as a string, in files and arguments."""

    @classmethod
    def supported(cls) -> tuple[Self, ...]:
        """The members that are implemented."""
        return tuple(cls)

    @classmethod
    def parse(cls, value: object) -> Self:
        """The member that a member or a string names: ``"MinMax"``, ``"min_max"`` or ``"CalibMethod.MinMax"``.

        Raises:
            ValueError: No member has this name, or it is not supported; names those that are.
        """
        member = value if isinstance(value, cls) else cls._named(value)
        allowed = " or ".join(item.name for item in cls.supported())
        if member is None:
            near = did_you_mean(value, [item.name for item in cls.supported()]) if isinstance(value, str) else ""
            raise ValueError(f"no {cls.__name__} has this name; use {allowed}{near}")
        if member not in cls.supported():
            raise ValueError(f"{cls.__name__}.{member.name} is not supported; use {allowed}")
        return member

    @classmethod
    def _named(cls, value: object) -> Self | None:
        if not isinstance(value, str) or isinstance(value, Choice):
            return None
        wanted = _plain(value.removeprefix(f"{cls.__name__}."))
        return next((item for item in cls if _plain(item.name) == wanted), None)


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").casefold()


class ScaleType(Choice):
    """How a scale is represented. Only Float32 is implemented: stock onnxruntime needs no other."""

    Float32 = "Float32"
    PowerOf2 = "PowerOf2"
    Int16 = "Int16"

    @classmethod
    def supported(cls) -> tuple[Self, ...]:
        """Float32."""
        return (cls.Float32,)


class CalibMethod(Choice):
    """How the range of an activation is found. MinMax and Percentile are implemented."""

    MinMax = "MinMax"
    MinMSE = "MinMSE"
    Percentile = "Percentile"
    Entropy = "Entropy"
    LayerwisePercentile = "LayerwisePercentile"
    Distribution = "Distribution"

    @classmethod
    def supported(cls) -> tuple[Self, ...]:
        """MinMax and Percentile."""
        return (cls.MinMax, cls.Percentile)


class QuantGranularity(Choice):
    """How many values share a scale; ``"per_tensor"`` and the like are understood too.

    Token, a scale for each row of an activation found when it is computed, is not in AMD Quark's ONNX part.
    """

    Tensor = "Tensor"
    Channel = "Channel"
    Group = "Group"
    Token = "Token"  # noqa: S105 - no password

    @classmethod
    def _named(cls, value: object) -> Self | None:
        if isinstance(value, str):
            value = value.removeprefix("per_").removeprefix("per-")
        return super()._named(value)


class OutputFormat(Choice):
    """How quantized Linears are written; ``"w4a8"`` and the like are understood in any case.

    ============ =====================================================================================================
    W4A8         weights of up to 4 bits per output channel, widened when they are loaded, and 8-bit activations:
                 runs as fast as W8
    NBITS        weights of up to 8 bits per channel or in groups, float activations (MatMulNBits)
    W8           weights as 8-bit integers per output channel or tensor, activations in 8 bits or float
    FAKE         float32 values that lie on the grids: for studies, at any number of bits; nothing gets smaller
    ============ =====================================================================================================
    """

    W4A8 = "w4a8"
    NBITS = "nbits"
    W8 = "w8"
    FAKE = "fake"


class OpType(Choice):
    """The operators whose constant weight can be quantized; Gather is the embedding."""

    MatMul = "MatMul"
    Gemm = "Gemm"
    Gather = "Gather"

    @classmethod
    def _named(cls, value: object) -> Self | None:
        # ONNX operator names are case-sensitive; so is this.
        return next((item for item in cls if item.name == value), None)
