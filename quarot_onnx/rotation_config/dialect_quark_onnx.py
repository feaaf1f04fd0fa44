"""AMD Quark ONNX's rotation config: R1 as pairs of nodes around each norm.

::

    {"R1_pairs": [{"prev_nodes": ["/model/embed_tokens/Gather"],
                   "norm_node": "/model/layers.0/input_layernorm/Mul_1",
                   "next_nodes": ["/model/layers.0/self_attn/q_proj/MatMul", "..."]}, ...]}
"""

from typing import Annotated

from pydantic import BeforeValidator, Field

from quarot_onnx.config.files import FileConfig
from quarot_onnx.config.strict import Strict

_Name = Annotated[str, Field(min_length=1)]
_Names = Annotated[tuple[_Name, ...], Field(min_length=1)]


def _empty_is_none(value: object) -> object:
    return None if value == "" else value


class QuarkOnnxPair(Strict):
    """One pair: what writes before a norm, the norm (optional), what reads it."""

    prev_nodes: _Names
    norm_node: Annotated[_Name | None, BeforeValidator(_empty_is_none)] = None
    next_nodes: _Names


class QuarkOnnxConfig(FileConfig):
    """The whole file."""

    R1_pairs: Annotated[tuple[QuarkOnnxPair, ...], Field(min_length=1)]
