"""`QConfig`: the whole of a quantization, with AMD Quark's names and positions.

    QConfig(
        QLayerConfig(activation=UInt8Spec(), weight=Int8Spec()),
        algo_config=[QuarotConfig(r_config_path="rotation_config.json")],
        OpTypesToQuantize=["MatMul", "Gemm"],
    )

Quark's extra options are keywords beside the fields, or the content of ``extra_options={...}``; `options` lists what
becomes of each.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, Field, StrictBool, field_validator, model_validator

from quarot_onnx.config.algorithm import (
    AlgoConfig,
    KVCacheConfig,
    QuarotConfig,
    RoundingConfig,
    SinkPrefixConfig,
    refuse_disorder,
    refuse_idle,
    with_settled_balance,
)
from quarot_onnx.config.choices import OutputFormat
from quarot_onnx.config.enums import OpType
from quarot_onnx.config.formats import Placed, level_misfit, misfit, placed, refuse_misfits, resolved, table_misfit
from quarot_onnx.config.lists import Algorithms, OpTypes, Patterns, Rules
from quarot_onnx.config.notes import format_notes, notes, rounding_notes
from quarot_onnx.config.options import ALL_OPTIONS, IGNORED, sort_option
from quarot_onnx.config.overrides import Overrides, rounded_as
from quarot_onnx.config.presets import WithoutPresets
from quarot_onnx.config.rules import (
    LayerRule,
    any_matches,
    leaves_out,
    matches,
    refuse_unknown_types,
)
from quarot_onnx.config.spec import QLayerConfig
from quarot_onnx.errors import ConfigError, did_you_mean


class QConfig(WithoutPresets):
    """What to quantize, how, and which algorithms to run.

    Attributes:
        global_config: For all nodes that nothing below speaks of; None leaves them in float.
        specific_layer_config: Rules by node name, glob or ^regex.
        layer_type_config: Rules by operator type.
        exclude: Nodes to leave in float, by name, glob or ^regex.
        algo_config: At most one of each, in this order: `QuarotConfig`, `SmoothQuantConfig`, `SinkPrefixConfig`, a
            rounding (`RTNConfig`, `GPTQConfig`, `GPTAQConfig` or `QronosConfig`), `KVCacheConfig`.
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
        output_format: How quantized Linears are written; None chooses, see `resolved_format`.
        accuracy_level: The least that the format NBITS computes with, as onnxruntime numbers it: 0 (as None) and 1
            float32, 2 float16, 3 bfloat16, 4 activations rounded to int8 per block.
        bias_correction: Add the mean error of each output to the bias of Linears whose inputs have a fixed scale.
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
    specific_layer_config: Rules = ()
    layer_type_config: Rules = ()
    exclude: Patterns = ()
    algo_config: Algorithms = ()
    use_external_data_format: StrictBool = False
    op_types_to_quantize: OpTypes = Field(default=(OpType.MatMul, OpType.Gemm), min_length=1)
    nodes_to_quantize: Patterns = ()
    activation_symmetric: StrictBool | None = None
    weight_symmetric: StrictBool | None = None
    percentile: float | None = Field(default=None, gt=50, le=100, strict=True)
    weights_only: StrictBool = False
    calib_data_size: int | None = Field(default=None, ge=1, strict=True)
    ignored_options: tuple[str, ...] = ()
    output_format: Annotated[OutputFormat, BeforeValidator(OutputFormat.parse)] | None = None
    accuracy_level: int | None = Field(default=None, ge=0, le=4, strict=True)
    bias_correction: StrictBool = False

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
            sort_option(name, data.pop(name), data, ignored)
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
    def _in_order(cls, algorithms: tuple[AlgoConfig, ...]) -> tuple[AlgoConfig, ...]:
        refuse_disorder(algorithms)
        return with_settled_balance(algorithms)

    @field_validator("layer_type_config")
    @classmethod
    def _known_types(cls, rules: tuple[LayerRule, ...]) -> tuple[LayerRule, ...]:
        refuse_unknown_types(rules)
        return rules

    @model_validator(mode="after")
    def _overridden(self) -> Self:
        overrides = Overrides(self.activation_symmetric, self.weight_symmetric, self.percentile, self.weights_only)
        overrides.refuse_contradiction(self.global_config)
        global_config = overrides.apply(self.global_config)
        if self.rounding is not None and global_config is not None:
            global_config = rounded_as(self.rounding, global_config)
        # The model is frozen for its users; it is not finished yet.
        object.__setattr__(self, "global_config", global_config)
        for name in ("specific_layer_config", "layer_type_config"):
            rules: tuple[LayerRule, ...] = getattr(self, name)
            object.__setattr__(
                self, name, tuple(rule.model_copy(update={"config": overrides.apply(rule.config)}) for rule in rules)
            )
        self._check_format()
        return self

    def _check_format(self) -> None:
        refuse_idle(self.algo_config, self._placed(), bias_correction=self.bias_correction)
        found = self.resolved_format
        if self.low_bit or self.output_format is not None:
            refuse_misfits(self._placed(), found, named=self.output_format is not None)
        if self.accuracy_level is not None:
            quantized = self.global_config is not None and self.global_config.activation is not None
            if level := level_misfit(found, quantized=quantized):
                raise ValueError(f"accuracy_level={self.accuracy_level}: {level}")

    def _placed(self) -> list[Placed]:
        return placed(self.global_config, self.specific_layer_config, self.layer_type_config, self.op_types_to_quantize)

    @property
    def quarot(self) -> QuarotConfig | None:
        """The QuaRot configuration among the algorithms."""
        return next((item for item in self.algo_config if isinstance(item, QuarotConfig)), None)

    @property
    def prefix(self) -> SinkPrefixConfig | None:
        """The sink prefix among the algorithms, unless it asks for none."""
        found = (item for item in self.algo_config if isinstance(item, SinkPrefixConfig))
        return next((item for item in found if item.needs_statistics), None)

    @property
    def kv_cache(self) -> KVCacheConfig | None:
        """The key/value cache among the algorithms, unless it stays in float."""
        found = (item for item in self.algo_config if isinstance(item, KVCacheConfig))
        return next((item for item in found if item.quantized), None)

    @property
    def balances_keys(self) -> bool:
        """Whether the keys of the cache are balanced, in place of R3."""
        return self.kv_cache is not None and bool(self.kv_cache.k_balance)

    @property
    def rounding(self) -> RoundingConfig | None:
        """The rounding among the algorithms."""
        return next((item for item in self.algo_config if isinstance(item, RoundingConfig)), None)

    @property
    def resolved_format(self) -> OutputFormat:
        """How Linears are written: `output_format`, or what the global configuration needs.

        QDQ where no format was named, all weights have 8 bits without groups, no rounding
        algorithm runs and activations are static or symmetric per token, 8-bit and not clipped. Otherwise W4A8 for
        weights of fewer bits with such activations, NBITS for weights alone, W8 for 8 bits, and FAKE where
        onnxruntime has no way to compute it in integers, as with activations beside weights in float.
        """
        return resolved(self._placed(), self.output_format, rounds=self.rounding is not None)

    @property
    def needs_samples(self) -> bool:
        """Whether statistics are taken of calibration samples, which are then looked at more than once."""
        return self.bias_correction or any(item.needs_statistics for item in self.algo_config)

    @property
    def low_bit(self) -> bool:
        """Whether weights are rounded before anything is written; others are rounded to nearest as they are written."""
        few = any(item.config.weight is not None and item.config.weight.bits < 8 for item in self._placed())
        return self.rounding is not None or few or self.resolved_format is not OutputFormat.QDQ

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for everything in this configuration that does not do what one could expect."""
        rules = (*self.specific_layer_config, *self.layer_type_config)
        others = [rule.config for rule in rules]
        found = notes(self.ignored_options, self.global_config, others, self.percentile)
        if self.quarot is not None:
            found += self.quarot.notes
        if self.rounding is not None:
            found += rounding_notes(self.rounding, [self.global_config, *others])
        found += tuple(note for item in self.algo_config if isinstance(item, KVCacheConfig) for note in item.notes)
        return found + format_notes(self._placed(), self.output_format, self.resolved_format, self.accuracy_level)

    def layer_config_for(self, node_name: str, op_type: str) -> QLayerConfig | None:
        """How a node with a constant weight is quantized: exclude > specific > type > global.

        Args:
            node_name: The node's name in the graph.
            op_type: Its operator type.

        Returns:
            The configuration, or None where the node is left in float.

        Raises:
            ConfigError: `specific_layer_config` names this very node, and its operator type is left out; or names an
                embedding with what only a Linear can have, or the other way about.
        """
        if leaves_out(self.exclude, self.nodes_to_quantize, node_name):
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
                self._check_node(rule, node_name, op_type)
                return rule.config
        if not quantizable:
            return None
        return by_type.config if by_type is not None else self.global_config

    def _check_node(self, rule: LayerRule, node_name: str, op_type: str) -> None:
        output_format = self.resolved_format
        if rule.config is None or not (self.low_bit or self.output_format):
            return
        if op_type == OpType.Gather:
            reason = table_misfit(rule.config.weight, output_format)
        else:
            reason = misfit(rule.config, output_format, single=True)
        if reason is not None:
            raise ConfigError(f"specific_layer_config: node {node_name!r} is a {op_type}: {reason}")

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


__all__ = ["QConfig"]
