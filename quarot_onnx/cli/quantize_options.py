"""The options of ``quantize``; None where nothing was typed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from quarot_onnx.cli import options as opt
from quarot_onnx.cli.cache_options import CacheOptions
from quarot_onnx.cli.calibration_options import CalibrationOptions
from quarot_onnx.cli.gptaq_options import GptaqOptions
from quarot_onnx.cli.options import ACTIVATIONS, CHECK, ROTATION, SCHEME, Key
from quarot_onnx.cli.weight_options import RoundingOptions, WeightOptions
from quarot_onnx.config.choices import OutputFormat, Precision, PrefixForm, Scheme


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """What is read and what is written."""

    model: opt.Model
    out: opt.Target


@dataclass(frozen=True, kw_only=True)
class SchemeOptions:
    """Schemes, files, and what concerns single places."""

    scheme: Annotated[
        Scheme | None,
        Option(
            metavar="SCHEME",
            help="All in one word: w8a8-dynamic (per token, the default), w8, w4a8, w4a16 or w4-block; with fixed "
            "scales w8a8-static, w4a8-static, w8a16-static or w4a16-static. Not with --w-bits, --a-bits.",
            rich_help_panel=SCHEME,
        ),
    ] = None
    config: Annotated[
        Path | None,
        Option(metavar="FILE", help="A QConfig as JSON or YAML, in place of options.", rich_help_panel=SCHEME),
    ] = None
    recipe: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="A recipe as YAML: ours, LLMC's, or a scheme by name.",
            rich_help_panel=SCHEME,
        ),
    ] = None
    format: Annotated[
        OutputFormat | None,
        Option(help="How Linears are written. Default: what holds the bits.", rich_help_panel=SCHEME),
        Key("format"),
    ] = None
    accuracy_level: Annotated[
        int | None,
        Option(metavar="L", min=0, max=4, help="For --format nbits: 4 computes with int8.", rich_help_panel=SCHEME),
        Key("accuracy_level"),
    ] = None
    lm_head: Annotated[
        Precision | None,
        Option(help="Default: as the scheme has it, else float.", rich_help_panel=SCHEME),
        Key("lm_head"),
    ] = None
    embedding: Annotated[Precision | None, Option(help="Default: float.", rich_help_panel=SCHEME), Key("embedding")] = (
        None
    )
    exclude: Annotated[
        list[str] | None,
        Option(
            metavar="NODE", help="A node, or a pattern, to leave in float; may be repeated.", rich_help_panel=SCHEME
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ActivationOptions:
    """Activations."""

    a_bits: Annotated[
        int | None,
        Option(metavar="N", help="2 to 8, per token; 16 is float. Default: 16.", rich_help_panel=ACTIVATIONS),
        Key("activations.bits"),
    ] = None
    a_groupsize: Annotated[
        int | None,
        Option(
            metavar="G",
            help="Features of a token that share a scale. Default: -1, all of them.",
            rich_help_panel=ACTIVATIONS,
        ),
        Key("activations.group_size"),
    ] = None
    a_sym: Annotated[
        bool | None,
        Option(
            "--a-sym/--a-asym",
            help="Default: symmetric per token, asymmetric for w8a8-static.",
            rich_help_panel=ACTIVATIONS,
        ),
        Key("activations.symmetric"),
    ] = None
    a_clip_ratio: Annotated[
        float | None,
        Option(metavar="R", help="Factor of the range. Default: 1.", rich_help_panel=ACTIVATIONS),
        Key("activations.clip_ratio"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SmoothingOptions:
    """What becomes of outliers."""

    smooth_alpha: Annotated[
        float | None,
        Option(
            metavar="A",
            min=0,
            max=1,
            help="SmoothQuant's strength. Default: not smoothed.",
            rich_help_panel=ACTIVATIONS,
        ),
        Key("smoothing.alpha"),
    ] = None
    prefix: Annotated[
        PrefixForm | None,
        Option(
            metavar="FORM",
            parser=PrefixForm.parse,
            help="auto, none, graph or npz: keep the tokens that attention sinks into in float, in the graph or in a "
            "file beside it. Default: none.",
            rich_help_panel=ACTIVATIONS,
        ),
        Key("prefix.form"),
    ] = None
    prefix_ids: Annotated[
        str | None,
        Option(
            metavar="ID,...",
            help="The tokens, with --prefix. Default: found on the calibration text.",
            rich_help_panel=ACTIVATIONS,
        ),
        Key("prefix.ids"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class RotationOptions:
    """Rotations."""

    r1: opt.R1 = None
    r2: opt.R2 = None
    r3: opt.R3 = None
    r4: opt.R4 = None
    rotation_config: opt.RotationFile = None
    r_matrix_dim: opt.RMatrixDim = None
    random_had: opt.RandomHad = False
    seed: opt.Seed = None
    block_size: opt.BlockSize = None
    split_cache: opt.SplitCache = False


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """The quantized model beside the original; past a limit nothing is written."""

    check: Annotated[
        bool, Option("--check/--no-check", help="Compare the quantized model with the original.", rich_help_panel=CHECK)
    ] = True
    check_tokens: Annotated[
        int | None, Option(metavar="N", min=8, help="Tokens compared. Default: 512.", rich_help_panel=CHECK)
    ] = None
    check_text: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="UTF-8 text. Default: what calibration left of its text, else Python's documentation.",
            rich_help_panel=CHECK,
        ),
    ] = None
    max_kl: opt.MaxKl = None
    max_ppl_ratio: opt.MaxPplRatio = None


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is checked and what is printed."""

    verify: opt.Verify = True
    feeds: opt.Feeds = None
    overwrite: opt.Overwrite = False
    jobs: Annotated[
        int | None,
        Option(metavar="N", min=1, help="Threads at work. Default: OMP_NUM_THREADS, or one per core."),
    ] = None
    provider: opt.Provider = None
    provider_option: opt.ProviderOption = None
    max_memory: opt.MaxMemory = None
    by_stages: opt.ByStages = None
    as_json: opt.Json = False
    quiet: opt.Quiet = False


# The panels of the help come in the order of the bases, last to first.
@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(
    OutputOptions,
    GptaqOptions,
    CheckOptions,
    RotationOptions,
    CalibrationOptions,
    CacheOptions,
    SmoothingOptions,
    ActivationOptions,
    RoundingOptions,
    WeightOptions,
    SchemeOptions,
    ModelArguments,
):
    """All options of ``quantize``."""

    rotate: Annotated[
        bool | None,
        Option("--rotate/--no-rotate", help="Rotate before quantizing. Default: on.", rich_help_panel=ROTATION),
    ] = None

    fix_shape: Annotated[
        list[str] | None,
        Option(metavar="NAME=VALUE", help="A free length of the graph that the output fixes; may be repeated."),
    ] = None
    scheduler: opt.Scheduler = None

    @property
    def no_rotate(self) -> bool:
        """Whether --no-rotate was typed."""
        return self.rotate is False
