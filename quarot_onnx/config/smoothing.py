"""SmoothQuant (Xiao et al. 2023, arXiv:2211.10438): what is hard to quantize moves from activations into weights."""

from typing import Annotated, Literal

from pydantic import Field

from quarot_onnx.config.algo import AlgoConfig


class SmoothQuantConfig(AlgoConfig):
    """Scale every input channel of a Linear down, and its weight's row up, by s = max|x|^α / max|w|^(1-α) (eq. 4).

    The scale of the input goes into what makes it: the norm before, or the Linear (up to down, V to O).

    Attributes:
        name: ``"smooth_quant"``.
        alpha: How much of the activations' range moves into the weights, from 0 to 1.
    """

    positional = ("alpha",)

    name: Literal["smooth_quant"] = "smooth_quant"
    alpha: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.5

    @property
    def needs_statistics(self) -> bool:
        """Yes."""
        return True


__all__ = ["SmoothQuantConfig"]
