"""The options of ``rotate``: some of those of ``quantize``."""

from dataclasses import dataclass

from quarot_onnx.cli import options as opt
from quarot_onnx.cli.quantize_options import ModelArguments, OutputOptions, RotationOptions


@dataclass(frozen=True, kw_only=True)
class RotateOptions(OutputOptions, RotationOptions, ModelArguments):
    """All options of ``rotate``."""

    recipe: opt.RecipeFile = None
    r1_matrix: opt.R1Matrix = None
    r2_matrix: opt.R2Matrix = None
