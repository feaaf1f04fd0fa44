"""Options of the GPTAQ authors' code that ask for nothing here, so that their command lines can be typed as they are.

The key/value cache stays in float: 16 bits are what is done anyway, and its grids then have no effect, there as here.
"""

from dataclasses import dataclass
from typing import Annotated

from typer import Option

from quarot_onnx.errors import ConfigError

_FLOAT_BITS = 16
_ANYWAY = ("fp32_had",)
_GRIDS = ("k_asym", "v_asym", "k_groupsize", "v_groupsize", "k_clip_ratio", "v_clip_ratio")


_Number = Annotated[int | None, Option(hidden=True)]
_Ratio = Annotated[float | None, Option(hidden=True)]


@dataclass(frozen=True, kw_only=True)
class GptaqOptions:
    """Options of the authors' ``main.py``."""

    k_bits: _Number = None
    v_bits: _Number = None
    k_groupsize: _Number = None
    v_groupsize: _Number = None
    k_clip_ratio: _Ratio = None
    v_clip_ratio: _Ratio = None
    k_asym: Annotated[bool | None, Option("--k-asym/--no-k-asym", hidden=True)] = None
    v_asym: Annotated[bool | None, Option("--v-asym/--no-v-asym", hidden=True)] = None
    k_pre_rope: Annotated[bool | None, Option("--k-pre-rope/--no-k-pre-rope", hidden=True)] = None
    fp32_had: Annotated[bool | None, Option("--fp32-had/--no-fp32-had", hidden=True)] = None


def cache_notes(options: GptaqOptions) -> tuple[str, ...]:
    """What to say of options of the authors' code that have no effect.

    Raises:
        ConfigError: One asks for a quantized key/value cache.
    """
    for name in ("k_bits", "v_bits"):
        bits = getattr(options, name)
        if bits not in {None, _FLOAT_BITS}:
            raise ConfigError(
                f"{_flag(name)} {bits}: the key/value cache is not quantized; use {_FLOAT_BITS}, or leave it out"
            )
    if options.k_pre_rope:
        raise ConfigError("--k-pre-rope: the key/value cache is not quantized; leave it out")
    given = [_flag(name) for name in (*_GRIDS, *_ANYWAY) if getattr(options, name) is not None]
    return (f"of no effect here: {', '.join(given)}",) if given else ()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
