"""Options of the key/value cache; those of the studies' code keep their names there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from quarot_onnx.cli.options import CACHE, Key
from quarot_onnx.config.choices import CacheForm, CacheScales

_BITS = "2 to 8; 16 is float. Default: 16."
_GROUP = "Entries of a head that share a scale; -1: a token with all heads. Default: the head."
_RATIO = "Factor of the range. Default: 1."
_ASYM = "Default: symmetric."


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Keys and values of the past."""

    kv_bits: Annotated[
        int | None,
        Option(
            metavar="N",
            help="Of keys and values: 8 or 4 as integers, others in float. Default: 16, float.",
            rich_help_panel=CACHE,
        ),
        Key("kv_cache.bits"),
    ] = None
    k_bits: Annotated[
        int | None, Option(metavar="N", help=f"Of keys: {_BITS}", rich_help_panel=CACHE), Key("kv_cache.k_bits")
    ] = None
    v_bits: Annotated[
        int | None, Option(metavar="N", help=f"Of values: {_BITS}", rich_help_panel=CACHE), Key("kv_cache.v_bits")
    ] = None
    k_groupsize: Annotated[
        int | None, Option(metavar="G", help=_GROUP, rich_help_panel=CACHE), Key("kv_cache.k_groupsize")
    ] = None
    v_groupsize: Annotated[
        int | None, Option(metavar="G", help="The same of values.", rich_help_panel=CACHE), Key("kv_cache.v_groupsize")
    ] = None
    k_asym: Annotated[
        bool | None, Option("--k-asym/--no-k-asym", help=_ASYM, rich_help_panel=CACHE), Key("kv_cache.k_asym")
    ] = None
    v_asym: Annotated[
        bool | None, Option("--v-asym/--no-v-asym", help=_ASYM, rich_help_panel=CACHE), Key("kv_cache.v_asym")
    ] = None
    k_clip_ratio: Annotated[
        float | None, Option(metavar="R", help=_RATIO, rich_help_panel=CACHE), Key("kv_cache.k_clip_ratio")
    ] = None
    v_clip_ratio: Annotated[
        float | None, Option(metavar="R", help=_RATIO, rich_help_panel=CACHE), Key("kv_cache.v_clip_ratio")
    ] = None
    k_pre_rope: Annotated[
        bool | None,
        Option("--k-pre-rope/--no-k-pre-rope", help="Keys are rounded before RoPE.", rich_help_panel=CACHE),
        Key("kv_cache.k_pre_rope"),
    ] = None
    k_balance: Annotated[
        bool | None,
        Option(
            "--k-balance/--no-k-balance",
            help="Keys and queries get a calibrated matrix in place of R3. Default: for integers of 4 bits.",
            rich_help_panel=CACHE,
        ),
        Key("kv_cache.k_balance"),
    ] = None
    kv_format: Annotated[
        CacheForm | None,
        Option(
            metavar="FORM",
            parser=CacheForm.parse,
            help="int, or fake: rounded and kept in float. Default: what holds the bits.",
            rich_help_panel=CACHE,
        ),
        Key("kv_cache.form"),
    ] = None
    kv_scales: Annotated[
        CacheScales | None,
        Option(
            metavar="SCALES",
            parser=CacheScales.parse,
            help="token: found at run time; tensor, head or channel: calibrated. Default: token; "
            "fixed ones for 8 bits in GroupQueryAttention.",
            rich_help_panel=CACHE,
        ),
        Key("kv_cache.scales"),
    ] = None
    kv_scale_file: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Fixed scales in onnxruntime-genai's format, in place of calibrated ones.",
            rich_help_panel=CACHE,
        ),
        Key("kv_cache.scale_file"),
    ] = None
