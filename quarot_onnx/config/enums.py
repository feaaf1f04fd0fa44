"""The choices that a configuration offers, under AMD Quark's names.

Members that Quark knows and this package does not implement exist, so that they can be refused by name with the way
out instead of with an AttributeError.
"""

from typing import Self

from quarot_onnx.config.choices import Choice


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
    """How the range of an activation is found; Auto, by the error of the Linears behind it, is not in AMD Quark."""

    MinMax = "MinMax"
    MinMSE = "MinMSE"
    Percentile = "Percentile"
    Entropy = "Entropy"
    LayerwisePercentile = "LayerwisePercentile"
    Distribution = "Distribution"
    Auto = "Auto"

    @classmethod
    def supported(cls) -> tuple[Self, ...]:
        """Those that are implemented."""
        return (cls.MinMax, cls.Percentile, cls.MinMSE, cls.Entropy, cls.Auto)

    @classmethod
    def _named(cls, value: object) -> Self | None:
        return super()._named("MinMSE" if isinstance(value, str) and value.casefold() == "mse" else value)


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


class OpType(Choice):
    """The operators whose constant weight can be quantized; Gather is the embedding."""

    MatMul = "MatMul"
    Gemm = "Gemm"
    Gather = "Gather"

    @classmethod
    def _named(cls, value: object) -> Self | None:
        # ONNX operator names are case-sensitive; so is this.
        return next((item for item in cls if item.name == value), None)
