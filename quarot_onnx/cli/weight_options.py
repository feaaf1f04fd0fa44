"""The options of ``quantize`` that speak of weights and their rounding; None where nothing was typed."""

from dataclasses import dataclass
from typing import Annotated

from typer import Option

from quarot_onnx.cli.options import ROUNDING, WEIGHTS, Key
from quarot_onnx.config.choices import Method, WeightType


@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    """Weights, with the names of the GPTAQ authors' code."""

    weights: Annotated[
        Method | None,
        Option(
            metavar="METHOD",
            help="Rounding: rtn, gptq, gptaq or qronos. Default: qronos below 8 bits, rtn at 8.",
            rich_help_panel=WEIGHTS,
        ),
        Key("weights.method"),
    ] = None
    w_bits: Annotated[
        int | None,
        Option(metavar="N", help="2 to 8; 16 is float. Default: 4 with --weights.", rich_help_panel=WEIGHTS),
        Key("weights.bits"),
    ] = None
    weight_type: Annotated[
        WeightType | None,
        Option(help="Of 8-bit weights. uint8, the default, is exact on every processor.", rich_help_panel=WEIGHTS),
        Key("weights.type"),
    ] = None
    w_groupsize: Annotated[
        int | None,
        Option(
            metavar="G", help="Input features that share a scale. Default: -1, all of them.", rich_help_panel=WEIGHTS
        ),
        Key("weights.group_size"),
    ] = None
    w_sym: Annotated[
        bool | None,
        Option("--w-sym/--w-asym", help="Default: symmetric.", rich_help_panel=WEIGHTS),
        Key("weights.symmetric"),
    ] = None
    per_channel: Annotated[
        bool | None,
        Option("--per-channel/--per-tensor", help="Scales. Default: per channel.", rich_help_panel=WEIGHTS),
        Key("weights.per_channel"),
    ] = None
    w_clip: Annotated[
        bool | None,
        Option("--w-clip/--no-w-clip", help="Search each low-bit range. Default: on.", rich_help_panel=WEIGHTS),
        Key("weights.clip"),
    ] = None
    w_rtn: Annotated[bool | None, Option("--w-rtn", help="The same as --weights rtn.", rich_help_panel=WEIGHTS)] = None
    use_v2: Annotated[bool | None, Option("--use-v2", help="The same as --weights gptaq.", rich_help_panel=WEIGHTS)] = (
        None
    )
    asym_calibrate: Annotated[
        bool | None, Option("--asym-calibrate", help="The same as --use-v2.", rich_help_panel=WEIGHTS)
    ] = None
    int8_down_proj: Annotated[
        bool | None,
        Option("--int8-down-proj", help="8 bits for down_proj and its input.", rich_help_panel=WEIGHTS),
        Key("int8_down_proj"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class RoundingOptions:
    """What rounding to nearest does not have."""

    percdamp: Annotated[
        float | None,
        Option(metavar="P", help="Damping of the Hessian. Default: 0.1, gptq 0.01.", rich_help_panel=ROUNDING),
        Key("weights.perc_damp"),
    ] = None
    act_order: Annotated[
        bool | None,
        Option("--act-order", help="Largest inputs first.", rich_help_panel=ROUNDING),
        Key("weights.act_order"),
    ] = None
    static_groups: Annotated[
        bool | None,
        Option("--static-groups", help="Fix the grids of groups beforehand.", rich_help_panel=ROUNDING),
        Key("weights.static_groups"),
    ] = None
    gptq_block_size: Annotated[
        int | None,
        Option(metavar="B", help="Input features at a time. Default: 128.", rich_help_panel=ROUNDING),
        Key("weights.block_size"),
    ] = None
    alpha: Annotated[
        float | None,
        Option(metavar="A", help="Correction of gptaq and qronos. Default: 0.25.", rich_help_panel=ROUNDING),
        Key("weights.alpha"),
    ] = None
    enable_aq_calibration: Annotated[
        bool | None,
        Option(
            "--enable-aq-calibration",
            help="Measure inputs behind quantized activations. Default with gptaq and qronos.",
            rich_help_panel=ROUNDING,
        ),
    ] = None
    no_enable_aq_calibration: Annotated[
        bool | None,
        Option("--no-enable-aq-calibration", help="Behind float ones. Default with gptq.", rich_help_panel=ROUNDING),
    ] = None
