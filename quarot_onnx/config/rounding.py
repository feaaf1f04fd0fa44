"""How weights are rounded to their grids: to nearest, or with second-order statistics of their inputs.

Equations for y = xW with W [in, out]; X are the inputs of a Linear on the float path, X~ those on the quantized path,
[tokens, in]:

======== ==========================================================================================================
RTN      each weight to the nearest integer
GPTQ     row by row of W, each error made up for by the rows still to come (Frantar et al. 2022, arXiv:2210.17323)
GPTAQ    GPTQ on X~ that also makes up for X~ not being X (Li et al. 2025, arXiv:2504.02692)
Qronos   corrects the error of X~ at each step before it rounds, then goes on as GPTQ (Zhang et al. 2025,
         arXiv:2505.11695)
======== ==========================================================================================================
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, StrictBool, model_validator

from quarot_onnx.config.algo import AlgoConfig
from quarot_onnx.config.misfits import groups_across_channels, order_across_groups
from quarot_onnx.config.numbers import refuse_disguised
from quarot_onnx.config.tensor import GroupSize


def _bits(value: object) -> object:
    refuse_disguised(value)
    if value is not None and (not isinstance(value, int) or not 2 <= value <= 8):
        raise ValueError("weights have 2 to 8 bits")
    return value


class RoundingConfig(AlgoConfig):
    """What all roundings have in common; use `RTNConfig`, `GPTQConfig`, `GPTAQConfig` or `QronosConfig`.

    The names are those of AMD Quark's GPTQConfig. The grid belongs to the weight spec of ``global_config``: bits,
    group_size, per_channel and weight_symmetric are None for "as the weight spec says". A value fills in what the
    spec does not set itself; one that contradicts the spec is refused. Rules keep what their own specs say.

    Attributes:
        name: The name of the algorithm.
        bits: 2 to 8, the bits of the weight spec; it only confirms them (Quark: 8).
        group_size: Consecutive input features that share a scale; None, or Quark's -1, as the spec says.
        per_channel: A scale for each output channel; False for one for the whole weight (Quark: False).
        mse: Search the grid for a factor of the range with the smallest error |w - q|^2.4, and cut off what is
            beyond. On by default, where Quark has it off: at 4 bits rounding is poor without it. GPTQ, GPTAQ and Qronos
            round each column below 8 bits with a few multiples of that scale and keep the one that costs its output
            least; not where a scale serves a whole weight, nor with groups that are not static.
        weight_symmetric: The zero point is the middle of the integers (Quark: True).
    """

    name: str
    bits: Annotated[int | None, BeforeValidator(_bits)] = None
    group_size: GroupSize = None
    per_channel: StrictBool | None = None
    mse: StrictBool = True
    weight_symmetric: StrictBool | None = None

    @model_validator(mode="after")
    def _groups_are_in_channels(self) -> Self:
        if self.per_channel is False and self.group_size is not None:
            raise ValueError(f"per_channel=False: {groups_across_channels(self.group_size)}")
        return self

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration data are needed."""
        return True

    @property
    def without_data(self) -> str:
        """Another rounding."""
        return "round to nearest (RTNConfig, on the command line --weights rtn)"

    @property
    def needs_drift(self) -> bool:
        """Whether the float model's inputs are needed beside the quantized path's."""
        return False

    @property
    def aq_calibration(self) -> bool:
        """Whether statistics come from the quantized path with its activations quantized."""
        return False


class RTNConfig(RoundingConfig):
    """Round to nearest, by default with the clip search; needs no calibration data.

    Attributes:
        name: ``"rtn"``.
    """

    positional = ("bits", "group_size", "per_channel", "mse", "weight_symmetric")

    name: Literal["rtn"] = "rtn"

    @property
    def needs_statistics(self) -> bool:
        """No."""
        return False


class HessianConfig(RoundingConfig):
    """What GPTQ, GPTAQ and Qronos have in common; positions are those of AMD Quark's GPTQConfig.

    Attributes:
        block_size: Input features that are rounded before the rest of the weight is updated; changes the speed, and
            the result only by float rounding.
        perc_damp: Damping: this part of the mean of the Hessian's diagonal is added to the diagonal, in (0, 1].
        act_order: Round the input features with the largest diagonal first; with groups it needs `static_groups`.
        static_groups: Fix the grids of all groups before the first error is passed on. Not in Quark.
        enable_aq_calibration: Measure the inputs with the activations of the layers before already quantized; None
            for the algorithm's own way: off for GPTQ, on for GPTAQ and Qronos. Not in Quark.
    """

    positional = (
        "bits",
        "block_size",
        "group_size",
        "perc_damp",
        "act_order",
        "per_channel",
        "mse",
        "weight_symmetric",
    )

    block_size: Annotated[int, Field(ge=1, strict=True)] = 128
    perc_damp: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.01
    act_order: StrictBool = False
    static_groups: StrictBool = False
    enable_aq_calibration: StrictBool | None = None

    @model_validator(mode="after")
    def _order_fits_groups(self) -> Self:
        self.refuse_order_with_groups(self.group_size)
        return self

    def refuse_order_with_groups(self, group_size: int | None) -> None:
        """Raise ValueError where the features of a group would be rounded apart from each other."""
        if self.act_order and group_size is not None and not self.static_groups:
            raise ValueError(f"act_order=True: {order_across_groups(group_size)}")

    @property
    def aq_calibration(self) -> bool:
        """`enable_aq_calibration`, or the algorithm's own way."""
        return bool(self.enable_aq_calibration)


class GPTQConfig(HessianConfig):
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323): what is not rounded yet makes up for each error.

    Attributes:
        name: ``"gptq"``.
    """

    name: Literal["gptq"] = "gptq"


class _DriftConfig(HessianConfig):
    """An algorithm that knows the float path from the quantized one.

    Attributes:
        perc_damp: As for GPTQ, but 0.1 by default: the correction rests on an inverse that 0.01 leaves to the noise of
            few calibration tokens (docs/accuracy.md has the figures).
    """

    perc_damp: Annotated[float, Field(gt=0, le=1, strict=True)] = 0.1

    @property
    def needs_drift(self) -> bool:
        """Yes."""
        return True

    @property
    def aq_calibration(self) -> bool:
        """`enable_aq_calibration`, on by default."""
        return self.enable_aq_calibration is not False


class GPTAQConfig(_DriftConfig):
    """GPTAQ, or GPTQ v2 (Li et al. 2025, arXiv:2504.02692): GPTQ that also makes up for the inputs' own error.

    Attributes:
        name: ``"gptaq"``.
        alpha: Factor of the correction for the inputs, 0 or more; 0.25 as in the authors' code (the paper's
            equation has none, which is 1).
    """

    name: Literal["gptaq"] = "gptaq"
    alpha: Annotated[float, Field(ge=0, strict=True)] = 0.25


class QronosConfig(_DriftConfig):
    """Qronos (Zhang et al. 2025, arXiv:2505.11695): corrects the weights for the inputs' error, then rounds.

    Attributes:
        name: ``"qronos"``.
        alpha: Factor of the correction, 0 or more; the paper has none, which is 1. 0.25 by default, which is better on
            held-out text and far better on text of another kind (docs/accuracy.md has the figures).
    """

    name: Literal["qronos"] = "qronos"
    alpha: Annotated[float, Field(ge=0, strict=True)] = 0.25


ROUNDINGS: Mapping[str, type[RoundingConfig]] = MappingProxyType(
    {str(owner.model_fields["name"].default): owner for owner in (RTNConfig, GPTQConfig, GPTAQConfig, QronosConfig)}
)
"""The methods by their names."""

__all__ = ["ROUNDINGS", "GPTAQConfig", "GPTQConfig", "HessianConfig", "QronosConfig", "RTNConfig", "RoundingConfig"]
