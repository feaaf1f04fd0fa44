"""How one tensor is quantized: `Int4Spec`, `Int8Spec`, `UInt8Spec` and their like.

Keywords and positions are AMD Quark's; `group_size` and `clip_ratio` are added. One default differs: ranges are
calibrated with MinMax, where Quark takes the 99.999 percentile. In a language model a few positions (the attention
sink) carry activations that dwarf all others; a percentile cuts them off, and the model with them.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, StrictBool, ValidationInfo, field_validator, model_validator

from quarot_onnx.config.data_type import DataType
from quarot_onnx.config.enums import CalibMethod, QuantGranularity, ScaleType
from quarot_onnx.config.numbers import refuse_disguised
from quarot_onnx.config.strict import Strict
from quarot_onnx.errors import ConfigError


def _group_size(value: object) -> object:
    if value is None or (value == -1 and isinstance(value, int)):
        return None  # AMD Quark writes -1
    refuse_disguised(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:
        raise ValueError("a group has 2 or more features; use -1, or leave it out, to have no groups")
    return value


GroupSize = Annotated[int | None, BeforeValidator(_group_size)]
"""Consecutive features that share a scale; None, or Quark's -1, for all of them."""

_Granularity = Annotated[QuantGranularity, BeforeValidator(QuantGranularity.parse)]
_Type = Annotated[DataType, BeforeValidator(DataType.parse)]


class QTensorConfig(Strict):
    """What all tensor specs have in common; use `Int4Spec`, `Int8Spec`, `UInt8Spec`, ….

    Attributes:
        symmetric: The zero point is the middle of the integer range (0 for int8, 128 for uint8).
        scale_type: Float32.
        calibration_method: How the range of a static activation is found. Weights always take their true range.
        quant_granularity: One scale for the tensor, for each output channel of a weight (or each row of an embedding),
            for each `group_size` input features of a channel, or for each token (row) of an activation.
        data_type: The integer type; fixed by the class.
        percentile: Per cent of the values that Percentile keeps inside the range.
        group_size: Consecutive input features that share a scale: of a weight (makes the granularity Group), or of
            a token (with granularity Token). None for all of them. Not in Quark's specs.
        clip_ratio: Factor of an activation's range, in (0, 1]: values beyond it are cut off. Not in Quark.
    """

    positional = ("symmetric", "scale_type", "calibration_method", "quant_granularity", "data_type")

    symmetric: StrictBool
    scale_type: Annotated[ScaleType, BeforeValidator(ScaleType.parse)] = ScaleType.Float32
    calibration_method: Annotated[CalibMethod, BeforeValidator(CalibMethod.parse)] = CalibMethod.MinMax
    quant_granularity: _Granularity = QuantGranularity.Tensor
    data_type: _Type
    percentile: float = Field(default=99.999, gt=50, le=100, strict=True)
    group_size: GroupSize = None
    clip_ratio: float = Field(default=1.0, gt=0, le=1, strict=True)

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Refuse classes without a data type; a group size alone asks for groups."""
        if cls not in _SPECS.values():
            raise ValueError("a base class; use Int8Spec or UInt8Spec, or one of fewer bits")
        if data.get("group_size") not in (None, -1) and "quant_granularity" not in data:
            data["quant_granularity"] = QuantGranularity.Group
        return data

    @field_validator("data_type")
    @classmethod
    def _of_this_class(cls, value: DataType) -> DataType:
        if cls is not _SPECS[value]:
            raise ValueError(f"{cls.__name__} cannot hold {value.name}; use {value.name}Spec")
        return value

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        granularity = self.quant_granularity
        if granularity is QuantGranularity.Group and self.group_size is None:
            raise ValueError("quant_granularity=Group needs a group_size; give group_size=128, or use Channel")
        if self.group_size is not None and granularity in {QuantGranularity.Tensor, QuantGranularity.Channel}:
            raise ValueError(
                f"group_size={self.group_size} contradicts quant_granularity={granularity.name}; "
                "use Group for weights, Token for activations"
            )
        return self

    def set_symmetric(self, symmetric: bool) -> None:
        """Refuse to change the spec, as Quark's examples do; raises ConfigError always."""
        self._refuse_change("symmetric", symmetric)

    def set_calibration_method(self, method: object) -> None:
        """Refuse to change the spec, as Quark's examples do; raises ConfigError always."""
        self._refuse_change("calibration_method", method)

    def _refuse_change(self, name: str, value: object) -> None:
        owner = type(self).__name__
        raise ConfigError(f"set_{name}: specs do not change once they are made; write {owner}({name}={value})")

    @property
    def bits(self) -> int:
        """Bits of an integer."""
        return self.data_type.bits

    @property
    def has_fixed_scale(self) -> bool:
        """Of an activation: whether calibration fixes its scale; else every token has its own."""
        return self.quant_granularity is not QuantGranularity.Token

    def described(self) -> str:
        """The spec as messages name it: its class and what sets it apart."""
        marks = [] if self.quant_granularity is QuantGranularity.Group else [self.quant_granularity.name]
        marks += [f"group_size={self.group_size}"] if self.group_size is not None else []
        return f"{type(self).__name__}({', '.join(marks)})"


class Int8Spec(QTensorConfig):
    """Signed 8-bit integers, symmetric.

    As weights beside 8-bit activations not exact on x86 processors without VNNI, where onnxruntime's products saturate;
    `UInt8Spec` is exact on all.
    """

    symmetric: StrictBool = True
    data_type: _Type = DataType.Int8


class UInt8Spec(QTensorConfig):
    """Unsigned 8-bit integers, asymmetric: the type for activations, which onnxruntime runs fastest.

    As weights, best with ``symmetric=True``, exact on every processor.
    """

    symmetric: StrictBool = False
    data_type: _Type = DataType.UInt8


class _Signed(QTensorConfig):
    """Signed integers of few bits: symmetric, one scale per channel."""

    symmetric: StrictBool = True
    quant_granularity: _Granularity = QuantGranularity.Channel


class _Unsigned(QTensorConfig):
    """Unsigned integers of few bits: asymmetric, one scale per channel."""

    symmetric: StrictBool = False
    quant_granularity: _Granularity = QuantGranularity.Channel


class Int2Spec(_Signed):
    """Signed 2-bit integers (-2 to 1), symmetric, per channel."""

    data_type: _Type = DataType.Int2


class Int3Spec(_Signed):
    """Signed 3-bit integers (-4 to 3), symmetric, per channel."""

    data_type: _Type = DataType.Int3


class Int4Spec(_Signed):
    """Signed 4-bit integers (-8 to 7), symmetric, per channel: the type for 4-bit weights."""

    data_type: _Type = DataType.Int4


class Int5Spec(_Signed):
    """Signed 5-bit integers (-16 to 15), symmetric, per channel; as weights stored in 8 bits."""

    data_type: _Type = DataType.Int5


class Int6Spec(_Signed):
    """Signed 6-bit integers (-32 to 31), symmetric, per channel; as weights stored in 8 bits."""

    data_type: _Type = DataType.Int6


class Int7Spec(_Signed):
    """Signed 7-bit integers (-64 to 63), symmetric, per channel: weights that saturate on no processor and run fast."""

    data_type: _Type = DataType.Int7


class Int16Spec(QTensorConfig):
    """Signed 16-bit integers, symmetric: for activations with a fixed scale, as toolchains of NPUs take them."""

    symmetric: StrictBool = True
    data_type: _Type = DataType.Int16


class UInt16Spec(QTensorConfig):
    """Unsigned 16-bit integers, asymmetric: for activations with a fixed scale, as toolchains of NPUs take them."""

    symmetric: StrictBool = False
    data_type: _Type = DataType.UInt16


class UInt2Spec(_Unsigned):
    """Unsigned 2-bit integers (0 to 3), asymmetric, per channel."""

    data_type: _Type = DataType.UInt2


class UInt3Spec(_Unsigned):
    """Unsigned 3-bit integers (0 to 7), asymmetric, per channel."""

    data_type: _Type = DataType.UInt3


class UInt4Spec(_Unsigned):
    """Unsigned 4-bit integers (0 to 15), asymmetric, per channel."""

    data_type: _Type = DataType.UInt4


class UInt5Spec(_Unsigned):
    """Unsigned 5-bit integers (0 to 31), asymmetric, per channel; as weights stored in 8 bits."""

    data_type: _Type = DataType.UInt5


class UInt6Spec(_Unsigned):
    """Unsigned 6-bit integers (0 to 63), asymmetric, per channel; as weights stored in 8 bits."""

    data_type: _Type = DataType.UInt6


class UInt7Spec(_Unsigned):
    """Unsigned 7-bit integers (0 to 127), asymmetric, per channel; as weights stored in 8 bits."""

    data_type: _Type = DataType.UInt7


_CONCRETE: tuple[type[QTensorConfig], ...] = (
    *(Int2Spec, Int3Spec, Int4Spec, Int5Spec, Int6Spec, Int7Spec, Int8Spec, Int16Spec),
    *(UInt2Spec, UInt3Spec, UInt4Spec, UInt5Spec, UInt6Spec, UInt7Spec, UInt8Spec, UInt16Spec),
)
_SPECS: dict[DataType, type[QTensorConfig]] = {spec.model_fields["data_type"].default: spec for spec in _CONCRETE}


def spec_class(data_type: DataType) -> type[QTensorConfig]:
    """The spec class of an integer type: `Int4Spec` for ``DataType.Int4``."""
    return _SPECS[data_type]


def as_spec(value: object, info: ValidationInfo) -> object:
    """The spec that a name (``"Int4"``) or a mapping with ``data_type`` describes; None and specs pass through.

    Raises:
        ValueError: None of these.
    """
    if value is None or isinstance(value, QTensorConfig):
        return value
    if isinstance(value, type):
        raise ValueError(f"{value.__name__} is a class; write {value.__name__}()")  # noqa: TRY004 - becomes a ConfigError
    if isinstance(value, str):
        return _SPECS[DataType.parse(value)].model_validate({})
    if isinstance(value, Mapping):
        if "data_type" not in value:
            raise ValueError(f"data_type is missing; set it to {' or '.join(_SPECS)}")
        return _SPECS[DataType.parse(value["data_type"])].model_validate(dict(value), context=info.context)
    raise ValueError("not a tensor spec; give Int8Spec(), UInt8Spec(), Int4Spec() or None")
