"""`QConfig`: the whole of a quantization, with AMD Quark's names and positions.

    QConfig(
        QLayerConfig(activation=UInt8Spec(), weight=Int8Spec()),
        algo_config=[QuarotConfig(r_config_path="rotation_config.json")],
        OpTypesToQuantize=["MatMul", "Gemm"],
    )

Quark's extra options are keywords beside the fields, or the content of ``extra_options={...}``; `_options` lists what
becomes of each.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, StrictBool, field_validator, model_validator

from quarot_onnx.errors import ConfigError, did_you_mean
from quarot_onnx.quantization.config._files import FileConfig
from quarot_onnx.quantization.config._notes import notes
from quarot_onnx.quantization.config._options import (
    ALL_OPTIONS,
    CONST_B_ONLY,
    HONOURED,
    IGNORED,
    REFUSED,
    asks_for_nothing,
)
from quarot_onnx.quantization.config._overrides import Overrides
from quarot_onnx.quantization.config._rules import LayerRule, Pattern, any_matches, as_rules, matches
from quarot_onnx.quantization.config.algorithm import AlgoConfig, QuarotConfig, as_algorithm
from quarot_onnx.quantization.config.enums import OpType
from quarot_onnx.quantization.config.spec import QLayerConfig


def _as_list(value: object) -> object:
    if isinstance(value, str | Mapping | AlgoConfig):
        raise ValueError("a list is needed; put it into [...]")  # noqa: TRY004 - becomes a ConfigError
    return () if value is None else value


_Rules = Annotated[tuple[LayerRule, ...], BeforeValidator(as_rules)]
_Patterns = Annotated[tuple[Pattern, ...], BeforeValidator(_as_list)]
_OpTypes = Annotated[tuple[Annotated[OpType, BeforeValidator(OpType.parse)], ...], BeforeValidator(_as_list)]
_Algorithms = Annotated[
    tuple[SerializeAsAny[Annotated[AlgoConfig, BeforeValidator(as_algorithm)]], ...], BeforeValidator(_as_list)
]


class QConfig(FileConfig):
    """What to quantize, how, and which algorithms to run before.

    Attributes:
        global_config: For all nodes that nothing below speaks of; None leaves them in float.
        specific_layer_config: Rules by node name, glob or ^regex.
        layer_type_config: Rules by operator type.
        exclude: Nodes to leave in float, by name, glob or ^regex.
        algo_config: At most one `QuarotConfig`.
        use_external_data_format: Write the weights beside the model.
        op_types_to_quantize: Operators that are quantized at all (``OpTypesToQuantize``).
        nodes_to_quantize: If not empty, only these nodes are quantized (``NodesToQuantize``).
        activation_symmetric: Overrides ``symmetric`` of activations that do not set it (``ActivationSymmetric``).
        weight_symmetric: So for weights (``WeightSymmetric``).
        percentile: Overrides ``percentile`` of activations that do not set it and makes Percentile the calibration
            method of those that do not set that (``Percentile``).
        weights_only: Drops the activations of all configs (``WeightsOnly``).
        calib_data_size: Number of calibration samples; None takes all (``CalibDataSize``).
        ignored_options: Quark's options that were given and change nothing here; `notes` says why.
    """

    positional = (
        "global_config",
        "specific_layer_config",
        "layer_type_config",
        "exclude",
        "algo_config",
        "use_external_data_format",
    )
    synonyms = (*ALL_OPTIONS, "extra_options")

    if TYPE_CHECKING:  # options and positions, which the fields alone do not tell a type checker

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    global_config: QLayerConfig | None
    specific_layer_config: _Rules = ()
    layer_type_config: _Rules = ()
    exclude: _Patterns = ()
    algo_config: _Algorithms = ()
    use_external_data_format: StrictBool = False
    op_types_to_quantize: _OpTypes = Field(default=(OpType.MatMul, OpType.Gemm), min_length=1)
    nodes_to_quantize: _Patterns = ()
    activation_symmetric: StrictBool | None = None
    weight_symmetric: StrictBool | None = None
    percentile: float | None = Field(default=None, gt=50, le=100, strict=True)
    weights_only: StrictBool = False
    calib_data_size: int | None = Field(default=None, ge=1, strict=True)
    ignored_options: tuple[str, ...] = ()

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Sort Quark's options into fields, ignored and refused ones."""
        extra = data.pop("extra_options", None) or {}
        if not isinstance(extra, Mapping):
            raise ValueError("extra_options is not a dict")  # noqa: TRY004 - becomes a ConfigError
        if twice := [key for key in extra if key in data]:
            raise ValueError(f"{', '.join(twice)} given both in extra_options and beside it")
        data |= extra
        ignored = [str(name) for name in data.pop("ignored_options", None) or ()]
        for name in [key for key in data if key in ALL_OPTIONS]:
            _sort_option(name, data.pop(name), data, ignored)
        if data.get("op_types_to_quantize", ()) is None:
            del data["op_types_to_quantize"]  # Quark: None is the default
        if added := data.pop("extra_op_types_to_quantize", None):
            base = data.get("op_types_to_quantize", cls.model_fields["op_types_to_quantize"].default)
            if not isinstance(base, list | tuple) or not isinstance(added, list | tuple):
                raise ValueError("OpTypesToQuantize and ExtraOpTypesToQuantize are lists")
            data["op_types_to_quantize"] = [*base, *(item for item in added if item not in base)]
        return data | {"ignored_options": sorted(set(ignored))}

    @field_validator("ignored_options")
    @classmethod
    def _known_options(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in IGNORED:
                raise ValueError(f"{name!r} is not an option that is ignored{did_you_mean(name, IGNORED)}")
        return names

    @field_validator("algo_config")
    @classmethod
    def _one_of_a_kind(cls, algorithms: tuple[AlgoConfig, ...]) -> tuple[AlgoConfig, ...]:
        if len(algorithms) > 1:
            raise ValueError("more than one QuarotConfig; rotate once")
        return algorithms

    @field_validator("layer_type_config")
    @classmethod
    def _known_types(cls, rules: tuple[LayerRule, ...]) -> tuple[LayerRule, ...]:
        for rule in rules:
            for name in rule.layers:
                if rule.config is not None or _is_near_miss(name):
                    _checked_type(name)
        return rules

    @model_validator(mode="after")
    def _overridden(self) -> Self:
        overrides = Overrides(self.activation_symmetric, self.weight_symmetric, self.percentile, self.weights_only)
        overrides.refuse_contradiction(self.global_config)
        # The model is frozen for its users; it is not finished yet.
        object.__setattr__(self, "global_config", overrides.apply(self.global_config))
        for name in ("specific_layer_config", "layer_type_config"):
            rules: tuple[LayerRule, ...] = getattr(self, name)
            object.__setattr__(
                self, name, tuple(rule.model_copy(update={"config": overrides.apply(rule.config)}) for rule in rules)
            )
        return self

    @property
    def quarot(self) -> QuarotConfig | None:
        """The QuaRot configuration among the algorithms."""
        return next((item for item in self.algo_config if isinstance(item, QuarotConfig)), None)

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for everything in this configuration that does not do what one could expect."""
        rules = (*self.specific_layer_config, *self.layer_type_config)
        return notes(self.ignored_options, self.global_config, [rule.config for rule in rules], self.percentile)

    def layer_config_for(self, node_name: str, op_type: str) -> QLayerConfig | None:
        """How a node with a constant weight is quantized: exclude > specific > type > global.

        Args:
            node_name: The node's name in the graph.
            op_type: Its operator type.

        Returns:
            The configuration, or None where the node is left in float.

        Raises:
            ConfigError: `specific_layer_config` names this very node, and its operator type is left out.
        """
        left_out = any_matches(self.exclude, node_name) or (
            bool(self.nodes_to_quantize) and not any_matches(self.nodes_to_quantize, node_name)
        )
        if left_out:
            return None
        by_type = next((rule for rule in self.layer_type_config if op_type in rule.layers), None)
        quantizable = op_type in self.op_types_to_quantize or (by_type is not None and by_type.config is not None)
        for rule in self.specific_layer_config:
            if not quantizable and rule.config is not None and node_name in rule.layers:
                raise ConfigError(
                    f"specific_layer_config: node {node_name!r} is a {op_type}, which is not quantized; "
                    f"add it to OpTypesToQuantize if it is one of {', '.join(OpType)}"
                )
            if quantizable and any_matches(rule.layers, node_name):
                return rule.config
        if not quantizable:
            return None
        return by_type.config if by_type is not None else self.global_config

    def unmatched_patterns(self, node_names: Iterable[str]) -> list[str]:
        """The names and patterns of this configuration that match no node of the graph.

        Args:
            node_names: The names of all nodes of the graph.

        Returns:
            The patterns, each once, in the order of exclude, nodes to quantize and specific rules.
        """
        names = set(node_names)
        given = [*self.exclude, *self.nodes_to_quantize]
        given += [pattern for rule in self.specific_layer_config for pattern in rule.layers]
        return [
            pattern
            for pattern in dict.fromkeys(given)
            if pattern not in names and not any(matches(pattern, name) for name in names)
        ]


def _sort_option(name: str, value: object, data: dict[str, Any], ignored: list[str]) -> None:
    if name in HONOURED:
        if HONOURED[name] in data:
            raise ValueError(f"{name} and {HONOURED[name]} are one and the same; give one of them")
        data[HONOURED[name]] = value
    elif name == CONST_B_ONLY:
        if value is not True:
            raise ValueError(f"{name}={value!r} is not supported: attention MatMuls stay in float; leave it out")
    elif name in IGNORED:
        ignored.append(name)
    elif not asks_for_nothing(name, value):
        raise ValueError(f"{name}={value!r} is not supported: {REFUSED[name]}")


def _checked_type(name: str) -> None:
    known = list(OpType.__members__)
    if name not in known:
        raise ValueError(f"{name!r} is no quantizable operator{did_you_mean(name, known)}; use {', '.join(known)}")


def _is_near_miss(name: str) -> bool:
    """Whether an operator type to be left out looks like a misspelling of one that is quantized."""
    if name in OpType.__members__ or name == "GatherND":
        return False
    spelt = {item.casefold() for item in OpType}
    return bool(get_close_matches(name.casefold(), spelt, n=1, cutoff=0.85))


__all__ = ["QConfig"]
