"""How one tensor (`Int8Spec`, `UInt8Spec`) and one node (`QLayerConfig`) are quantized.

Keywords and positions are AMD Quark's. One default differs: ranges are calibrated with MinMax, where Quark takes the
99.999 percentile. In a language model a few positions (the attention sink) carry activations that dwarf all others;
a percentile cuts them off, and the model with them.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, Field, StrictBool, ValidationInfo, field_validator, model_validator

from quarot_onnx.quantization.config._strict import Strict
from quarot_onnx.quantization.config.data_type import DataType
from quarot_onnx.quantization.config.enums import CalibMethod, QuantGranularity, ScaleType


class QTensorConfig(Strict):
    """What all tensor specs have in common; use `Int8Spec` or `UInt8Spec`.

    Attributes:
        symmetric: The zero point is the middle of the integer range (0 for int8, 128 for uint8).
        scale_type: Float32.
        calibration_method: How the range of an activation is found. Weights always take their true range.
        quant_granularity: One scale for the tensor, or one for each output channel of a weight.
        data_type: The integer type; fixed by the class.
        percentile: Per cent of the values that Percentile keeps inside the range.
    """

    positional = ("symmetric", "scale_type", "calibration_method", "quant_granularity", "data_type")

    symmetric: StrictBool
    scale_type: Annotated[ScaleType, BeforeValidator(ScaleType.parse)] = ScaleType.Float32
    calibration_method: Annotated[CalibMethod, BeforeValidator(CalibMethod.parse)] = CalibMethod.MinMax
    quant_granularity: Annotated[QuantGranularity, BeforeValidator(QuantGranularity.parse)] = QuantGranularity.Tensor
    data_type: Annotated[DataType, BeforeValidator(DataType.parse)]
    percentile: float = Field(default=99.999, gt=50, le=100, strict=True)

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Refuse the base class itself, which has no data type."""
        if cls is QTensorConfig:
            raise ValueError("a base class; use Int8Spec or UInt8Spec")
        return data

    @field_validator("data_type")
    @classmethod
    def _of_this_class(cls, value: DataType) -> DataType:
        if cls is not _SPECS[value]:
            raise ValueError(f"{cls.__name__} cannot hold {value.name}; use {value.name}Spec")
        return value


class Int8Spec(QTensorConfig):
    """Signed 8-bit integers, symmetric: the type for weights."""

    symmetric: StrictBool = True
    data_type: Annotated[DataType, BeforeValidator(DataType.parse)] = DataType.Int8


class UInt8Spec(QTensorConfig):
    """Unsigned 8-bit integers, asymmetric: the type for activations, which onnxruntime runs fastest."""

    symmetric: StrictBool = False
    data_type: Annotated[DataType, BeforeValidator(DataType.parse)] = DataType.UInt8


_SPECS: dict[DataType, type[Int8Spec] | type[UInt8Spec]] = {DataType.Int8: Int8Spec, DataType.UInt8: UInt8Spec}


def _as_spec(value: object, info: ValidationInfo) -> object:
    if value is None or isinstance(value, QTensorConfig):
        return value
    if isinstance(value, type):
        raise ValueError(f"{value.__name__} is a class; write {value.__name__}()")  # noqa: TRY004 - becomes a ConfigError
    if isinstance(value, str):
        return _SPECS[DataType.parse(value)]()
    if isinstance(value, Mapping):
        if "data_type" not in value:
            raise ValueError(f"data_type is missing; set it to {' or '.join(_SPECS)}")
        return _SPECS[DataType.parse(value["data_type"])].model_validate(dict(value), context=info.context)
    raise ValueError("not a tensor spec; give Int8Spec(), UInt8Spec() or None")


Spec = Annotated[QTensorConfig, BeforeValidator(_as_spec)]


class QLayerConfig(Strict):
    """How a node is quantized: static Q/DQ on its input, integers for its weight.

    ``input_tensors`` is the newer name of ``activation`` in AMD Quark; both are taken, not both at once. Up to two
    positional arguments are (activation, weight); more follow Quark's newer order (input_tensors, activation,
    weight, bias, output_tensors).

    Attributes:
        activation: The input, per tensor; None quantizes the weight only.
        weight: The constant weight, per tensor or per output channel.
        output_tensors: The output, per tensor; None, which is better, puts no Q/DQ there.
    """

    synonyms = ("input_tensors", "bias")

    if TYPE_CHECKING:  # synonyms and positions, which the fields alone do not tell a type checker

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    activation: Annotated[QTensorConfig | None, BeforeValidator(_as_spec)] = None
    weight: Spec
    output_tensors: Annotated[QTensorConfig | None, BeforeValidator(_as_spec)] = None

    @classmethod
    def positional_names(cls, count: int) -> tuple[str, ...]:
        """(activation, weight), or Quark's newer order where there are more than two."""
        if count <= 2:
            return ("activation", "weight")
        return ("input_tensors", "activation", "weight", "bias", "output_tensors")

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Take ``input_tensors`` for ``activation``; refuse ``bias`` and a missing weight."""
        inputs = data.pop("input_tensors", None)
        if inputs is not None:
            if data.get("activation") is not None:
                raise ValueError("activation and input_tensors are one and the same; give one of them")
            data["activation"] = inputs
        if data.pop("bias", None) is not None:
            raise ValueError("bias cannot be set: biases are not quantized on their own; leave it out")
        if data.keys() <= cls.model_fields.keys() and data.get("weight") is None:
            raise ValueError("weight is missing; give weight=Int8Spec(), or exclude the nodes to leave them in float")
        return data

    @model_validator(mode="after")
    def _fits_onnxruntime(self) -> Self:
        for name, spec in (("activation", self.activation), ("output_tensors", self.output_tensors)):
            dynamic = name == "activation" and spec is not None and spec.quant_granularity is QuantGranularity.Token
            if spec is not None and not dynamic and spec.quant_granularity is not QuantGranularity.Tensor:
                raise ValueError(
                    f"{name}: quant_granularity={spec.quant_granularity.name} is not supported; "
                    "static activations are quantized per Tensor, inputs also per Token"
                )
        if self.activation is not None and self.activation.quant_granularity is QuantGranularity.Token:
            if not self.activation.symmetric:
                raise ValueError("activation: per Token is symmetric; use Int8Spec(quant_granularity='Token')")
            if self.output_tensors is not None:
                raise ValueError("output_tensors with a per-Token activation is not supported; leave out one of them")
        if self.weight.quant_granularity is QuantGranularity.Token:
            raise ValueError("weight: quant_granularity=Token is for activations; use Channel or Tensor")
        if self.weight.quant_granularity is QuantGranularity.Group:
            raise ValueError("weight: quant_granularity=Group is not supported for 8 bits; use Channel or Tensor")
        if self.output_tensors is not None and self.activation is None:
            raise ValueError("output_tensors without activation; give both, or none to quantize the weight only")
        return self

    @property
    def input_tensors(self) -> QTensorConfig | None:
        """AMD Quark's newer name of `activation`."""
        return self.activation


__all__ = [
    "CalibMethod",
    "Int8Spec",
    "QLayerConfig",
    "QTensorConfig",
    "QuantGranularity",
    "ScaleType",
    "UInt8Spec",
]
