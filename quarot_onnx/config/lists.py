"""The lists of a `QConfig`, as they are taken from a file or an argument."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from quarot_onnx.config.algorithm import AlgoConfig, as_algorithm
from quarot_onnx.config.enums import OpType
from quarot_onnx.config.rules import LayerRule, Pattern, as_rules


def _as_list(value: object) -> object:
    if isinstance(value, str | Mapping | AlgoConfig):
        raise ValueError("a list is needed; put it into [...]")  # noqa: TRY004 - becomes a ConfigError
    return () if value is None else value


Rules = Annotated[tuple[LayerRule, ...], BeforeValidator(as_rules)]
Patterns = Annotated[tuple[Pattern, ...], BeforeValidator(_as_list)]
OpTypes = Annotated[tuple[Annotated[OpType, BeforeValidator(OpType.parse)], ...], BeforeValidator(_as_list)]
Algorithms = Annotated[
    tuple[SerializeAsAny[Annotated[AlgoConfig, BeforeValidator(as_algorithm)]], ...], BeforeValidator(_as_list)
]
