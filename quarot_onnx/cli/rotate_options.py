"""The options of ``rotate``: some of those of ``quantize``."""

from dataclasses import dataclass
from typing import Annotated

from typer import Option

from quarot_onnx.cli import options as opt
from quarot_onnx.cli.quantize_options import ModelArguments, OutputOptions, RotationOptions


@dataclass(frozen=True, kw_only=True)
class RotateOptions(OutputOptions, RotationOptions, ModelArguments):
    """All options of ``rotate``."""

    recipe: opt.RecipeFile = None
    r1_matrix: opt.R1Matrix = None
    r2_matrix: opt.R2Matrix = None
    prefix_ids: Annotated[
        str | None,
        Option(
            metavar="ID,...",
            help="Tokens that the graph holds as a sink prefix; quantize --prefix finds them.",
            rich_help_panel=opt.ROTATION,
        ),
        opt.Key("prefix.ids"),
    ] = None
