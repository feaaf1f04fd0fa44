"""Our own recipe: what ``rotate`` and ``quantize`` do to a model, in one strict file.

::

    rotation: {use_random_had: true, seed: 0, r4: true}
    weights: {method: gptq, bits: 4}
    activations: {bits: 4, symmetric: false, clip_ratio: 0.9}
    format: fake
    calibration: {samples: 16, seq_len: 512}

It speaks of bits, as the papers do; :mod:`.build` makes a `QConfig` of it. ``docs/recipes.md`` lists all keys.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StrictBool, StrictStr

from quarot_onnx.config.algorithm import (
    AlgoConfig,
    KVCacheConfig,
    QuarotConfig,
    SinkPrefixConfig,
    SmoothQuantConfig,
)
from quarot_onnx.config.choices import Choice, Method, OutputFormat, Precision, WeightType
from quarot_onnx.config.enums import CalibMethod, QuantGranularity
from quarot_onnx.config.files import FileConfig
from quarot_onnx.config.numbers import FLOAT_BITS, refuse_disguised
from quarot_onnx.config.paths import ConfigPath
from quarot_onnx.config.rounding import ROUNDINGS, RTNConfig
from quarot_onnx.config.rules import Pattern
from quarot_onnx.config.strict import Strict
from quarot_onnx.config.tensor import GroupSize

_DEFAULT_BITS = 4
_BITS = (2, 3, 4, 5, 6, 7, 8)


def _weight_bits(value: object) -> object:
    refuse_disguised(value)
    if value is not None and (type(value) is not int or value not in (*_BITS, FLOAT_BITS)):
        raise ValueError("weights have 2 to 8 bits, or 16, which leaves them in float")
    return value


def _activation_bits(value: object) -> object:
    refuse_disguised(value)
    if type(value) is not int or value not in (*_BITS, FLOAT_BITS):
        raise ValueError("activations have 2 to 8 bits, or 16: float, or integers with a fixed scale")
    return value


def _activation_granularity(value: object) -> object:
    found = QuantGranularity.parse(value)
    if found not in {QuantGranularity.Token, QuantGranularity.Tensor}:
        raise ValueError("activations are quantized per token, or per tensor with a fixed scale; use token or tensor")
    return found


def _optional(choice: type[Choice]) -> BeforeValidator:
    return BeforeValidator(lambda value: None if value is None else choice.parse(value))


def _bos(value: object) -> object:
    if value is not None and not isinstance(value, bool) and (type(value) is not int or value < 0):
        raise ValueError("true forces the BOS that the tokenizer's files name, false none, a number is its id")
    return value


class Weights(Strict):
    """The weights of Linears.

    Attributes:
        method: How they are rounded; None for qronos below 8 bits and rtn at 8.
        bits: 2 to 8, or 16 for float; None for 4 where a method is given, else 16.
        type: The integers of all weights of 8 bits beside 8-bit activations, the head's among them; None for uint8.
        group_size: Consecutive input features that share a scale; None or -1 for all of them.
        per_channel: A scale for each output; False for one for the whole weight.
        symmetric: The zero point is the middle of the integers.
        clip: Search each range for the factor with the smallest error.
        perc_damp: Damping, as a part of the mean of the Hessian's diagonal. Not for rtn, as all that follow.
        act_order: Round the input features with the largest diagonal first.
        static_groups: Fix the grids of all groups beforehand.
        block_size: Input features that are rounded before the rest is updated.
        alpha: Factor of gptaq's and qronos' correction for the inputs.
        enable_aq_calibration: Measure inputs behind quantized activations; None for the method's own way.
    """

    method: Annotated[Method | None, _optional(Method)] = None
    bits: Annotated[int | None, BeforeValidator(_weight_bits)] = None
    type: Annotated[WeightType | None, _optional(WeightType)] = None
    group_size: GroupSize = None
    per_channel: StrictBool = True
    symmetric: StrictBool = True
    clip: StrictBool = True
    perc_damp: float | None = Field(default=None, gt=0, le=1, strict=True)
    act_order: StrictBool = False
    static_groups: StrictBool = False
    block_size: int | None = Field(default=None, ge=1, strict=True)
    alpha: float | None = Field(default=None, ge=0, strict=True)
    enable_aq_calibration: StrictBool | None = None

    @property
    def resolved_bits(self) -> int:
        """`bits`, or the default."""
        if self.bits is not None:
            return self.bits
        return FLOAT_BITS if self.method is None else _DEFAULT_BITS

    @property
    def resolved_method(self) -> Method:
        """`method`, or the default."""
        if self.method is not None:
            return self.method
        return Method.QRONOS if self.resolved_bits < 8 else Method.RTN

    def of_methods(self) -> dict[str, Any]:
        """What is given of the options of some method alone: fields of its configuration, under the same name.

        0 and False are given like all else that is not the default.
        """
        known = {name for config in ROUNDINGS.values() for name in config.model_fields} - RTNConfig.model_fields.keys()
        values = {name: (getattr(self, name), of.default) for name, of in type(self).model_fields.items()}
        return {name: value for name, (value, default) in values.items() if name in known and value is not default}


class Activations(Strict):
    """The inputs of Linears.

    Attributes:
        bits: 2 to 8; 16 for float, or, where the granularity is Tensor, for integers of 16 bits.
        symmetric: The zero point is the middle of the integers.
        group_size: Consecutive features of a token that share a scale; None or -1 for all of them.
        clip_ratio: Factor of the range; values beyond it are cut off.
        granularity: Token, or Tensor with a scale that calibration fixes.
        calibration_method: How that scale is found, MinMax or Percentile; None for MinMax.
        percentile: Of Percentile, above 50, at most 100; None for 99.999.
        bias_correction: Add the mean error of each output to the bias, where scales are fixed.
    """

    bits: Annotated[int, BeforeValidator(_activation_bits)] = FLOAT_BITS
    symmetric: StrictBool = True
    group_size: GroupSize = None
    clip_ratio: float = Field(default=1.0, gt=0, le=1, strict=True)
    granularity: Annotated[QuantGranularity, BeforeValidator(_activation_granularity)] = QuantGranularity.Token
    calibration_method: Annotated[CalibMethod | None, _optional(CalibMethod)] = None
    percentile: float | None = Field(default=None, gt=50, le=100, strict=True)
    bias_correction: StrictBool = False

    @property
    def quantized(self) -> bool:
        """Whether they are."""
        integers = self.granularity is QuantGranularity.Tensor and "bits" in self.model_fields_set
        return self.bits < FLOAT_BITS or integers


class Calibration(Strict):
    """The text that statistics are taken on.

    Attributes:
        text: A UTF-8 file; None for what the model writes, or for Python's own documentation.
        text_key: The key of the text in JSON lines; None for a plain text, and for ``text`` in .jsonl files.
        tokenizer: A tokenizer.json or the folder that holds one; None for the one beside the model.
        samples: Windows of the text.
        spread: They are from all over it, where each of as many parts of it holds one; otherwise one after the other
            from its start.
        own: Windows that the model writes itself, beside those of a text that is named; None for as many as ``samples``
            where weights are rounded by statistics, 16 at most beside a text, and for none elsewhere.
        seq_len: Tokens of a window, BOS among them.
        bos: True forces the BOS that the tokenizer's files name, False none, a number is its id; None leaves it to
            the files.
        decode_steps: Tokens of a window that are decoded one by one where fixed scales are calibrated; None for 4
            where the graph has a cache.
    """

    text: ConfigPath = None
    text_key: StrictStr | None = None
    tokenizer: ConfigPath = None
    samples: int = Field(default=16, ge=1, strict=True)
    spread: StrictBool = True
    own: int | None = Field(default=None, ge=0, strict=True)
    seq_len: int = Field(default=512, ge=2, strict=True)
    bos: Annotated[bool | int | None, BeforeValidator(_bos)] = None
    decode_steps: int | None = Field(default=None, ge=0, strict=True)


class Recipe(FileConfig):
    """All that is done to a model.

    Attributes:
        rotation: Which rotations; None, where it is left out, for none.
        smoothing: How strongly SmoothQuant scales, after the rotation; None, where it is left out, for not at all.
        prefix: Which tokens stay out of the integers, and where they are kept; None, where it is left out, for none.
        weights: How weights are rounded.
        activations: How their inputs are.
        kv_cache: How keys and values of the past are kept; None, where it is left out, in float.
        lm_head: How the head is stored; None for float.
        embedding: How the embedding is stored; None for float.
        int8_down_proj: Down projections have 8 bits, weights per channel, activations per token; weights in float stay
            so.
        format: How quantized Linears are written; None chooses what holds them.
        accuracy_level: What the format nbits computes with.
        exclude: Nodes to leave in float.
        calibration: The text.
    """

    rotation: QuarotConfig | None = None
    smoothing: SmoothQuantConfig | None = None
    prefix: SinkPrefixConfig | None = None
    weights: Weights = Field(default_factory=Weights)
    activations: Activations = Field(default_factory=Activations)
    kv_cache: KVCacheConfig | None = None
    lm_head: Annotated[Precision | None, _optional(Precision)] = None
    embedding: Annotated[Precision | None, _optional(Precision)] = None
    int8_down_proj: StrictBool = False
    format: Annotated[OutputFormat | None, _optional(OutputFormat)] = None
    accuracy_level: int | None = Field(default=None, ge=0, le=4, strict=True)
    exclude: tuple[Pattern, ...] = ()
    calibration: Calibration = Field(default_factory=Calibration)

    @property
    def transforms(self) -> tuple[AlgoConfig, ...]:
        """What is done to the float model after its rotation, in order."""
        return tuple(item for item in (self.smoothing, self.prefix) if item is not None)

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Refuse a section without content: it could mean nothing, or the defaults."""
        for name in ("rotation", "smoothing", "prefix", "weights", "activations", "kv_cache", "calibration"):
            if name in data and data[name] is None:
                raise ValueError(f"the section {name} is empty; write {name}: {{}} for its defaults, or take it out")
        return data

    def to_dict(self, *, folder: Path | None = None) -> dict[str, Any]:
        """Plain data, as in `Strict.to_dict`; sections that are not there are left out, as in a file."""
        data = super().to_dict(folder=folder)
        absent = {key for key in ("rotation", "smoothing", "prefix", "kv_cache") if getattr(self, key) is None}
        return {key: value for key, value in data.items() if key not in absent}


__all__ = ["Activations", "Calibration", "Recipe", "Weights"]
