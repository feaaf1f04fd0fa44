"""This package's own rotation config: everything that detection finds, and what to leave out.

::

    {"format": "quarot_onnx/1",
     "R1": {"hidden_size": 64, "pairs": [{"previous": ["..."], "norm": "...", "readers": ["..."]}]},
     "R2": [{"attention": "...", "value": "...", "output": "..."}],
     "R3": "detect",
     "R4": [{"node": "...", "size": 96}],
     "online_pairs": ["..."]}

A rotation that is absent is not stated. ``"detect"`` puts it where the structure of the graph shows.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from quarot_onnx.config.algorithm import BlockSize
from quarot_onnx.config.files import FileConfig
from quarot_onnx.config.strict import Strict
from quarot_onnx.errors import did_you_mean
from quarot_onnx.rotation_config.names import Names
from quarot_onnx.sites.model import Kind, Sites

FORMAT = "quarot_onnx/1"
DETECT = "detect"

_Name = Annotated[str, Field(min_length=1)]
_Names = Annotated[tuple[_Name, ...], Field(min_length=1)]
_Size = Annotated[int, Field(ge=1, strict=True)]
_Start = Annotated[int, Field(ge=0, strict=True)]


def _places(value: object) -> object:
    """``"detect"`` as no places; an empty list, which could mean anything, is refused."""
    if value == DETECT:
        return ()
    if isinstance(value, str):
        raise _not_understood(value, "a list of places")
    if isinstance(value, list) and not value:
        raise ValueError(f'an empty list: give "{DETECT}", a list of places, or leave the key out')
    return value


def _not_understood(value: str, other: str) -> ValueError:
    return ValueError(f'not understood{did_you_mean(value, [DETECT])}; give "{DETECT}" or {other}')


def _written(places: tuple[Strict, ...] | None) -> object:
    return DETECT if places == () else places


def _as_r1(value: object) -> object:
    if value == DETECT:
        return {}
    if isinstance(value, str):
        raise _not_understood(value, '{"pairs": [...]}')
    if value is not None and not isinstance(value, dict | R1Entry):
        raise ValueError(f'not understood; give "{DETECT}" or {{"pairs": [...]}}, or leave the key out')
    return value


def _as_node(value: object) -> object:
    return {"node": value} if isinstance(value, str) else value


class PairEntry(Strict):
    """An R1 site: what is written before a norm, and what reads it.

    Attributes:
        previous: The embedding's Gather, or the Linears whose outputs are added to the stream.
        norm: Any node of the norm; None: the norm that the readers read.
        readers: The Linears that read the norm.
    """

    previous: _Names
    norm: _Name | None = None
    readers: _Names


class R1Entry(Strict):
    """R1.

    Attributes:
        pairs: The sites; empty: where detection finds them.
        hidden_size: Length of the residual stream, checked.
        block_size: Block of a block-diagonal R1.
    """

    pairs: Annotated[tuple[PairEntry, ...], BeforeValidator(_places), PlainSerializer(_written)] = ()
    hidden_size: _Size | None = None
    block_size: BlockSize | None = None


class R2Entry(Strict):
    """An R2 site. Sizes are checked; they are needed only where detection does not see them.

    Attributes:
        attention: The Softmax or the fused operator.
        value: The Linear that makes V.
        output: The Linear that reads the attention's result.
        value_start: First of V's columns in ``value``'s output.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Length of a head.
    """

    attention: _Name
    value: _Name
    output: _Name
    value_start: _Start | None = None
    num_heads: _Size | None = None
    num_kv_heads: _Size | None = None
    head_dim: _Size | None = None


class R3Entry(Strict):
    """An R3 site: the attention, and the length of its heads, checked."""

    attention: _Name
    head_dim: _Size | None = None


class NodeEntry(Strict):
    """A Linear at whose input a Hadamard goes: an R4 site or an online pair.

    Attributes:
        node: The Linear.
        size: Its number of inputs, checked.
        block_size: Block of a block-diagonal Hadamard.
    """

    node: _Name
    size: _Size | None = None
    block_size: BlockSize | None = None


class LeaveOut(Strict):
    """Detected sites that get no rotation: attentions for R2 and R3, Linears for R4."""

    R2: tuple[_Name, ...] = ()
    R3: tuple[_Name, ...] = ()
    R4: tuple[_Name, ...] = ()


_Node = Annotated[NodeEntry, BeforeValidator(_as_node)]


class OwnConfig(FileConfig):
    """The whole file. For R2 to R4 None is "not stated" and an empty tuple is "detect"."""

    format: Literal["quarot_onnx/1"]
    R1: Annotated[R1Entry | None, BeforeValidator(_as_r1)] = None
    R2: Annotated[tuple[R2Entry, ...] | None, BeforeValidator(_places), PlainSerializer(_written)] = None
    R3: Annotated[tuple[R3Entry, ...] | None, BeforeValidator(_places), PlainSerializer(_written)] = None
    R4: Annotated[tuple[_Node, ...] | None, BeforeValidator(_places), PlainSerializer(_written)] = None
    online_pairs: tuple[_Node, ...] = ()
    leave_out: LeaveOut = LeaveOut()

    def to_dict(self, *, folder: Path | None = None) -> dict[str, Any]:  # noqa: ARG002 - there are no paths in it
        """Plain data without the keys that say nothing."""
        return self.model_dump(mode="json", exclude_none=True, exclude_defaults=True)

    @property
    def speaks_of_decoder(self) -> bool:
        """Whether anything but online pairs is stated."""
        return any(getattr(self, kind) is not None for kind in Kind) or self.leave_out != LeaveOut()

    @model_validator(mode="after")
    def _leaves_out_of_detection_only(self) -> Self:
        for kind in (Kind.R2, Kind.R3, Kind.R4):
            if getattr(self.leave_out, kind) and getattr(self, kind):
                raise ValueError(f'leave_out.{kind} is for "{kind}": "{DETECT}"; take it out of the list instead')
        return self


def as_config(sites: Sites, block_sizes: Mapping[Kind, int] | None = None) -> dict[str, Any]:
    """What was found, in our own dialect; reading it back on the same graph gives the same sites.

    Args:
        sites: What detection found or a file named.
        block_sizes: Blocks of block-diagonal R1 and R4.

    Returns:
        JSON types only. Rotations without a site are absent.

    Raises:
        ConfigError: A node can be called neither by its own name nor by its output's.
    """
    blocks = block_sizes or {}
    linears = (*sites.writers, *sites.mlps, *(pair.linear for pair in sites.online_pairs))
    nodes = [*(item.node for item in linears), *(a.node for a in sites.attentions), *(s.norm.node for s in sites.norms)]
    if not nodes or nodes[0].graph is None:
        return {"format": FORMAT}
    name = Names(nodes[0].graph).reference
    pairs = [
        {
            "previous": [name(item.node) for item in site.previous],
            "norm": name(site.norm.node),
            "readers": [name(linear.node) for linear in site.readers],
        }
        for site in sites.norms
    ]
    content: dict[str, Any] = {
        "R1": {"hidden_size": sites.hidden_size, **_block(blocks.get(Kind.R1)), "pairs": pairs} if pairs else None,
        "R2": [
            {
                "attention": name(a.node),
                "value": name(a.value.node),
                "output": name(a.output.node),
                "value_start": a.value_start,
                "num_heads": a.num_heads,
                "num_kv_heads": a.num_kv_heads,
                "head_dim": a.head_dim,
            }
            for a in sites.r2
            if a.value and a.output
        ],
        "R3": [{"attention": name(a.node), "head_dim": a.head_dim} for a in sites.r3],
        "R4": [{"node": name(ln.node), "size": ln.in_features, **_block(blocks.get(Kind.R4))} for ln in sites.mlps],
        "online_pairs": [
            {"node": name(pair.linear.node), "size": pair.linear.in_features, **_block(pair.block_size)}
            for pair in sites.online_pairs
        ],
    }
    return {"format": FORMAT, **{key: value for key, value in content.items() if value}}


def _block(size: int | None) -> dict[str, int]:
    return {} if size is None else {"block_size": size}
