"""What users choose between, in files, in arguments and as options alike. Nothing heavy is imported here."""

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
            ValueError: No member has this name, or it is not supported; names those that are, as files spell them.
        """
        member = value if isinstance(value, cls) else cls._named(value)
        allowed = " or ".join(cls.supported())
        if member is None:
            near = did_you_mean(value, [item.value for item in cls.supported()]) if isinstance(value, str) else ""
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


class OutputFormat(Choice):
    """How quantized Linears are written; ``"w4a8"`` and the like are understood in any case.

    ============ =====================================================================================================
    QDQ          weights as 8-bit integers per output channel or tensor, activations in 8 or 16 bits or float, in
                 QuantizeLinear and DequantizeLinear alone; beside a fixed scale weights of 4 bits, too
    W4A8         weights of up to 4 bits per output channel, widened when they are loaded, and 8-bit activations:
                 runs as fast as W8
    NBITS        weights of up to 8 bits per channel or in groups, float activations (MatMulNBits)
    W8           the same with activations; weights alone as MatMulNBits
    FAKE         float32 values that lie on the grids: for studies, at any number of bits; nothing gets smaller
    ============ =====================================================================================================
    """

    QDQ = "qdq"
    W4A8 = "w4a8"
    NBITS = "nbits"
    W8 = "w8"
    FAKE = "fake"


class Method(Choice):
    """How weights are rounded."""

    RTN = "rtn"
    GPTQ = "gptq"
    GPTAQ = "gptaq"
    QRONOS = "qronos"


class WeightType(Choice):
    """The integers that 8-bit weights are stored as, beside 8-bit activations.

    UINT8 is exact on every processor. INT8 is not on x86 without VNNI: there onnxruntime adds two products at a time in
    16 bits, which saturate.
    """

    INT8 = "int8"
    UINT8 = "uint8"


class PrefixForm(Choice):
    """Where the tokens of a sink prefix are kept: as constants of the graph, in a file beside it, or not at all."""

    AUTO = "auto"
    NONE = "none"
    GRAPH = "graph"
    NPZ = "npz"


class CacheForm(Choice):
    """How a quantized key/value cache is written: as integers, or rounded and in float."""

    AUTO = "auto"
    INT = "int"
    FAKE = "fake"


class CacheScales(Choice):
    """What the integers of a key/value cache have a scale for: found at run time, or, from CHANNEL on, fixed."""

    AUTO = "auto"
    TOKEN = "token"  # noqa: S105 - no password
    CHANNEL = "channel"
    HEAD = "head"
    TENSOR = "tensor"


class Scheme(Choice):
    """The recipes that are shipped, by name: what ``--scheme`` and ``--recipe`` take."""

    W8A8_DYNAMIC = "w8a8-dynamic"
    W8A8_STATIC = "w8a8-static"
    W8A16_STATIC = "w8a16-static"
    W4A16_STATIC = "w4a16-static"
    W4A8_STATIC = "w4a8-static"
    W8 = "w8"
    W4A8 = "w4a8"
    W4A16 = "w4a16"
    W4_BLOCK = "w4-block"


class Precision(Choice):
    """How the head or the embedding is stored."""

    FLOAT = "float"
    INT8 = "int8"
    INT4 = "int4"
