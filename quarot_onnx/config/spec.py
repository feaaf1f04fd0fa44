"""How one node is quantized (`QLayerConfig`), with the specs of its tensors from :mod:`.tensor`."""

from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, model_validator

from quarot_onnx.config.enums import CalibMethod, QuantGranularity, ScaleType
from quarot_onnx.config.strict import Strict
from quarot_onnx.config.tensor import (
    Int2Spec,
    Int3Spec,
    Int4Spec,
    Int5Spec,
    Int6Spec,
    Int7Spec,
    Int8Spec,
    Int16Spec,
    QTensorConfig,
    UInt2Spec,
    UInt3Spec,
    UInt4Spec,
    UInt5Spec,
    UInt6Spec,
    UInt7Spec,
    UInt8Spec,
    UInt16Spec,
    as_spec,
    spec_class,
)

Spec = Annotated[QTensorConfig, BeforeValidator(as_spec)]


class QLayerConfig(Strict):
    """How a node is quantized: its input on a fixed or a per-token grid, integers for its weight.

    ``input_tensors`` is the newer name of ``activation`` in AMD Quark; both are taken, not both at once. Up to two
    positional arguments are (activation, weight); more follow Quark's newer order (input_tensors, activation,
    weight, bias, output_tensors).

    Two configurations of the same content are equal, but two keys of a dict, as in Quark: of
    ``{QLayerConfig(w): [a], QLayerConfig(w): [b]}`` both rules hold.

    Attributes:
        activation: The input, static per tensor or per token (also in groups), with 2 to 8 bits, or static with 16;
            None quantizes the weight only.
        weight: The constant weight of 2 to 8 bits, per tensor, per output channel or in groups of input features. None,
            which must be said, leaves it in float and quantizes the activation only, in the format FAKE.
        output_tensors: The output, per tensor; None, which is better, puts no Q/DQ there.
    """

    synonyms = ("input_tensors", "bias")

    if TYPE_CHECKING:  # synonyms and positions, which the fields alone do not tell a type checker

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    activation: Annotated[QTensorConfig | None, BeforeValidator(as_spec)] = None
    weight: Spec | None
    output_tensors: Annotated[QTensorConfig | None, BeforeValidator(as_spec)] = None

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
        # None is a weight in float only where it is said, and where an activation is left to quantize.
        left_out = data.get("weight") is None and ("weight" not in data or data.get("activation") is None)
        if data.keys() <= cls.model_fields.keys() and left_out:
            raise ValueError("weight is missing; give weight=Int8Spec(), or exclude the nodes to leave them in float")
        return data

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.activation is not None:
            if self.activation.has_fixed_scale:
                _check_static("activation", self.activation)
            elif self.activation.bits > 8:
                raise ValueError(
                    f"activation: {self.activation.bits}-bit activations have a fixed scale per Tensor, not per Token; "
                    "leave out quant_granularity"
                )
            elif self.output_tensors is not None:
                raise ValueError("output_tensors with a per-Token activation is not supported; leave out one of them")
        elif self.output_tensors is not None:
            raise ValueError("output_tensors without activation; give both, or none to quantize the weight only")
        if self.output_tensors is not None:
            _check_static("output_tensors", self.output_tensors)
        if self.weight is not None:
            _check_weight(self.weight)
        elif self.output_tensors is not None:
            raise ValueError("output_tensors with a weight in float is not supported; leave it out")
        return self

    def __hash__(self) -> int:
        """By identity, so that a dict of rules does not take one of two equal configurations for the other."""
        return object.__hash__(self)

    @property
    def input_tensors(self) -> QTensorConfig | None:
        """AMD Quark's newer name of `activation`."""
        return self.activation


def _check_static(name: str, spec: QTensorConfig) -> None:
    """Refuse what an activation with a fixed grid cannot be."""
    owner, is_input = type(spec).__name__, name == "activation"
    if is_input and spec.group_size is not None:
        token = f"quant_granularity='Token', group_size={spec.group_size}"
        raise ValueError(f"{name}: groups of an activation are within a token; use {owner}({token})")
    if is_input and spec.bits < 8 and spec.quant_granularity is not QuantGranularity.Tensor:
        raise ValueError(
            f"{name}: {spec.bits}-bit activations are quantized per Token, or static per Tensor; "
            f"use {owner}(quant_granularity='Token') or {owner}(quant_granularity='Tensor')"
        )
    if not is_input and spec.bits < 8:
        raise ValueError(f"{name}: outputs have 8 bits, not {spec.bits}; use UInt8Spec()")
    if spec.quant_granularity is not QuantGranularity.Tensor:
        raise ValueError(
            f"{name}: quant_granularity={spec.quant_granularity.name} is not supported; "
            "static activations are quantized per Tensor, inputs also per Token"
        )
    if not is_input and spec.clip_ratio < 1:
        raise ValueError(f"{name}: clip_ratio={spec.clip_ratio} is for inputs; leave it out")


def _check_weight(spec: QTensorConfig) -> None:
    """Refuse what a weight cannot be."""
    if spec.bits > 8:
        raise ValueError(f"weight: weights have 2 to 8 bits, not {spec.bits}; use Int8Spec()")
    if spec.quant_granularity is QuantGranularity.Token:
        raise ValueError("weight: quant_granularity=Token is for activations; use Channel, Group or Tensor")
    if spec.clip_ratio < 1:
        raise ValueError(
            f"weight: clip_ratio={spec.clip_ratio} is for activations; "
            "the range of weights is searched by a rounding algorithm with mse=True"
        )


__all__ = [
    "CalibMethod",
    "Int2Spec",
    "Int3Spec",
    "Int4Spec",
    "Int5Spec",
    "Int6Spec",
    "Int7Spec",
    "Int8Spec",
    "Int16Spec",
    "QLayerConfig",
    "QTensorConfig",
    "QuantGranularity",
    "ScaleType",
    "UInt2Spec",
    "UInt3Spec",
    "UInt4Spec",
    "UInt5Spec",
    "UInt6Spec",
    "UInt7Spec",
    "UInt8Spec",
    "UInt16Spec",
    "spec_class",
]
