"""Which nodes a configuration speaks of: names, glob patterns, regular expressions; rules that map them to configs.

A pattern is a node's exact name, or a glob (``*``, ``?``, ``[...]``) over the whole name, or, where it starts with
``^``, a regular expression that must match from the start of the name.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import BeforeValidator, Field

from quarot_onnx.config.enums import OpType
from quarot_onnx.config.spec import QLayerConfig
from quarot_onnx.config.strict import Strict
from quarot_onnx.errors import did_you_mean


def _checked(value: object) -> str:
    if isinstance(value, list | tuple):
        raise ValueError("subgraphs (start, end) are not supported; list the nodes by name, glob or ^regex")  # noqa: TRY004 - becomes a ConfigError
    if not isinstance(value, str) or not value:
        raise ValueError("not a node name, glob or ^regex")
    if value.startswith("^"):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
    return value


Pattern = Annotated[str, BeforeValidator(_checked)]


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern names the node."""
    if pattern == name:
        return True
    if pattern.startswith("^"):
        return re.match(pattern, name) is not None
    return fnmatchcase(name, pattern)


def any_matches(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the patterns names the node."""
    return any(matches(pattern, name) for pattern in patterns)


def leaves_out(exclude: Sequence[str], nodes_to_quantize: Sequence[str], name: str) -> bool:
    """Whether a node is excluded, or others alone are named."""
    return any_matches(exclude, name) or (bool(nodes_to_quantize) and not any_matches(nodes_to_quantize, name))


class LayerRule(Strict):
    """A layer configuration and whom it concerns.

    Attributes:
        config: How these nodes are quantized; None leaves them in float.
        layers: Patterns of node names, or operator types.
    """

    config: QLayerConfig | None
    layers: tuple[Pattern, ...] = Field(min_length=1)


def as_rules(value: object) -> object:
    """All spellings of a rule table as a list of mappings or `LayerRule`.

    Taken: ``{QLayerConfig: [names]}`` as in Quark, ``{name: config}`` for files, ``[(config, [names])]``,
    ``[{"config": ..., "layers": [...]}]``. Equal configs are two keys of a dict (see `QLayerConfig`).

    Raises:
        ValueError: None of these.
    """
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return [
            {"config": given, "layers": [key]} if isinstance(key, str) else {"config": key, "layers": given}
            for key, given in value.items()
        ]
    if isinstance(value, list | tuple):
        return [_as_rule(item) for item in value]
    raise ValueError("not a rule table; give {QLayerConfig(...): [names]}")


def _as_rule(item: object) -> object:
    if isinstance(item, LayerRule | Mapping):
        return item
    if isinstance(item, list | tuple) and len(item) == 2:
        return {"config": item[0], "layers": item[1]}
    raise ValueError("a rule is a pair (config, [names]) or a mapping with config and layers")


def refuse_unknown_types(rules: Iterable[LayerRule]) -> None:
    """Raise ValueError where a rule by type names no quantizable operator.

    A rule that leaves nodes in float may name any operator, but not a near miss of a quantizable one.
    """
    known = list(OpType.__members__)
    for rule in rules:
        for name in rule.layers:
            if name not in known and (rule.config is not None or _is_near_miss(name)):
                near = did_you_mean(name, known)
                raise ValueError(f"{name!r} is no quantizable operator{near}; use {', '.join(known)}")


def _is_near_miss(name: str) -> bool:
    """Whether an operator type to be left out looks like a misspelling of one that is quantized."""
    if name == "GatherND":
        return False
    spelt = {item.casefold() for item in OpType}
    return bool(get_close_matches(name.casefold(), spelt, n=1, cutoff=0.85))
