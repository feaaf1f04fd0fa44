"""From a recipe and the places of a model to a `QConfig`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import QuarotConfig, RoundingConfig
from quarot_onnx.config.choices import Method, OutputFormat, Precision, WeightType
from quarot_onnx.config.data_type import DataType
from quarot_onnx.config.enums import OpType, QuantGranularity
from quarot_onnx.config.formats import BLOCKS
from quarot_onnx.config.numbers import FLOAT_BITS
from quarot_onnx.config.rounding import ROUNDINGS
from quarot_onnx.config.rules import any_matches
from quarot_onnx.config.spec import Int4Spec, Int8Spec, QLayerConfig, QTensorConfig, UInt8Spec, spec_class
from quarot_onnx.errors import ConfigError
from quarot_onnx.graph.query import label
from quarot_onnx.recipes.own import Activations, Recipe, Weights
from quarot_onnx.recipes.wording import Wording
from quarot_onnx.sites.model import Sites

_BLOCK = 128


@dataclass(frozen=True)
class Parts:
    """What a recipe names by its part in the model.

    Attributes:
        head: The language model head's nodes and the number of their input features.
        down: The down projections' nodes.
        hidden: Columns of the embedding; None where there is none.
        tables: The embeddings' nodes.
    """

    head: tuple[tuple[str, int], ...] = ()
    down: tuple[str, ...] = ()
    hidden: int | None = None
    tables: tuple[str, ...] = ()

    @classmethod
    def of(cls, sites: Sites) -> "Parts":
        """The places of a model, found by structure."""
        return cls(
            head=tuple((linear.name, linear.in_features) for linear in sites.head),
            down=tuple(linear.name for linear in sites.mlps),
            hidden=sites.embeddings[0].table.shape[1] if sites.embeddings else None,
            tables=tuple(label(embedding.node) for embedding in sites.embeddings),
        )

    def without(self, exclude: Sequence[str]) -> "Parts":
        """Those that patterns do not name."""
        head = tuple((name, features) for name, features in self.head if not any_matches(exclude, name))
        down, tables = (tuple(n for n in names if not any_matches(exclude, n)) for names in (self.down, self.tables))
        return Parts(head, down, self.hidden, tables)


def rotation_alone(recipe: Recipe) -> QuarotConfig | None:
    """A recipe's rotation for a run that only rotates, with R4 left out where quantizing would leave it out.

    Args:
        recipe: What it quantizes later on decides about R4, unless its rotation or a rotation config file does.

    Returns:
        The rotation; None where the recipe has none. What it leaves open is for ``pipeline.rotate``, which does R4
        where the model allows it.
    """
    rotation = recipe.rotation
    if rotation is None or rotation.r4 is not None or rotation.r_config_path is not None:
        return rotation
    weights_alone = recipe.weights.resolved_bits < FLOAT_BITS and not recipe.activations.quantized
    static = recipe.activations.granularity is QuantGranularity.Tensor
    smoothed = recipe.smoothing is not None and static
    return rotation.model_copy(update={"r4": False}) if weights_alone or smoothed else rotation


def quantization_config(recipe: Recipe, parts: Parts, rotation: QuarotConfig | None, wording: Wording) -> QConfig:
    """The configuration that does what a recipe says.

    Args:
        recipe: Free of contradictions, see ``rules``.
        parts: Of the model.
        rotation: The rotation that is still to be done, or that the model is to be compared with.
        wording: Whose words errors use.

    Raises:
        ConfigError: The model has no such place, or the format cannot hold what is asked for.
    """
    layer = layer_config(recipe)
    plain = is_plain(recipe)
    rounding = None if plain else rounding_config(recipe.weights)
    roundings = [] if rounding is None else [rounding]
    cache = [recipe.kv_cache] if recipe.kv_cache is not None and recipe.kv_cache.quantized else []
    unnamed = QConfig(layer, algo_config=roundings).resolved_format
    # What is written anyway needs no name: a shipped scheme is the plain QConfig that it always was.
    named = None if plain and unnamed is OutputFormat.QDQ else recipe.format
    written = named or unnamed
    head = recipe.lm_head or Precision.FLOAT
    # A plain head is quantized like every Linear.
    ruled = head is not Precision.FLOAT and not plain
    if ruled and not parts.head:
        raise ConfigError(f"{wording.named('lm_head')}: the graph has no language model head; leave it out")
    left = parts.without(recipe.exclude)
    rules = _head_rules(recipe, left, head, written) if ruled and left.head else []
    if recipe.int8_down_proj:
        if not parts.down:
            raise ConfigError(f"{wording.named('int8_down_proj')}: the graph has no down projection; leave it out")
        rules += [(_eight_bits(recipe, written), list(left.down))] if left.down else []
    types, tables = [OpType.MatMul, OpType.Gemm], []
    if recipe.embedding not in {None, Precision.FLOAT} and (left.tables or not parts.tables):
        types.append(OpType.Gather)
        # A Gather has no activation to quantize; naming the global one says that nothing is left out.
        tables.append(
            (
                QLayerConfig(activation=activation_spec(recipe.activations), weight=_table(recipe, parts)),
                [OpType.Gather],
            )
        )
    return QConfig(
        layer,
        specific_layer_config=rules,
        layer_type_config=tables,
        exclude=[*([name for name, _ in parts.head] if head is Precision.FLOAT else ()), *recipe.exclude],
        algo_config=[*([] if rotation is None else [rotation]), *recipe.transforms, *roundings, *cache],
        OpTypesToQuantize=types,
        output_format=named,
        accuracy_level=recipe.accuracy_level,
        bias_correction=recipe.activations.bias_correction,
    )


def exclude_notes(recipe: Recipe, parts: Parts, wording: Wording) -> tuple[str, ...]:
    """What to say where nodes that are excluded were named for other bits, or would have stayed in float anyway.

    Args:
        recipe: What is asked for.
        parts: Of the model.
        wording: Whose words the notes use.
    """
    left, excluded = parts.without(recipe.exclude), wording.named("exclude")
    asked = (
        ("lm_head", recipe.lm_head not in {None, Precision.FLOAT}, parts.head, left.head),
        ("int8_down_proj", recipe.int8_down_proj, parts.down, left.down),
        ("embedding", recipe.embedding not in {None, Precision.FLOAT}, parts.tables, left.tables),
    )
    found = [
        f"{excluded} leaves in float what {wording.named(key)} names"
        for key, is_asked, there, kept in asked
        if is_asked and there and not kept
    ]
    if recipe.exclude and layer_config(recipe) is None:
        found.append(f"{excluded} has no effect: weights and activations stay in float")
    return tuple(found)


def head_note(recipe: Recipe, config: QConfig, wording: Wording) -> str | None:
    """What to say where the head is left in float for want of a word, in a model that is to run fast."""
    if recipe.lm_head is not None or config.resolved_format is OutputFormat.FAKE:
        return None
    return f"the head stays in float; {wording.advised('lm_head', 'int8')} makes decoding faster"


def is_plain(recipe: Recipe) -> bool:
    """Whether weights are rounded to nearest, to 8 bits, as they are written."""
    weights = recipe.weights
    nearest = weights.resolved_bits == 8 and weights.resolved_method is Method.RTN and not weights.clip
    return recipe.format is OutputFormat.QDQ and nearest


def layer_config(recipe: Recipe) -> QLayerConfig | None:
    """How Linears are quantized; None where neither weights nor inputs are."""
    activation = activation_spec(recipe.activations)
    weight = weight_spec(recipe.weights, activation)
    return None if activation is None and weight is None else QLayerConfig(activation=activation, weight=weight)


def weight_spec(weights: Weights, activation: QTensorConfig | None) -> QTensorConfig | None:
    """The spec of weights: integers of fewer than 8 bits are signed where symmetric, for 8 bits see `eight_bit_spec`.

    None where they stay in float.
    """
    bits = weights.resolved_bits
    if bits == FLOAT_BITS:
        return None
    kind = _eight_bit_type(weights.type, activation) if bits == 8 else DataType.of(bits, signed=weights.symmetric)
    granularity = QuantGranularity.Channel if weights.per_channel else QuantGranularity.Tensor
    return spec_class(kind)(
        data_type=kind,
        symmetric=weights.symmetric,
        quant_granularity=granularity if weights.group_size is None else QuantGranularity.Group,
        group_size=weights.group_size,
    )


def eight_bit_spec(
    wanted: WeightType | None,
    activation: QTensorConfig | None,
    *,
    symmetric: bool = True,
    granularity: QuantGranularity = QuantGranularity.Channel,
) -> QTensorConfig:
    """The spec of an 8-bit weight.

    Args:
        wanted: The type that was asked for; None for uint8 beside activations, whose products are exact on every
            processor, and for int8 without, where the two are the same to onnxruntime.
        activation: How the Linear's input is quantized.
        symmetric: The zero point is the middle of the integers.
        granularity: Channel or Tensor.
    """
    kind = _eight_bit_type(wanted, activation)
    return spec_class(kind)(data_type=kind, symmetric=symmetric, quant_granularity=granularity)


def _eight_bit_type(wanted: WeightType | None, activation: QTensorConfig | None) -> DataType:
    if wanted is None:
        return DataType.Int8 if activation is None else DataType.UInt8
    return DataType.Int8 if wanted is WeightType.INT8 else DataType.UInt8


def activation_spec(activations: Activations) -> QTensorConfig | None:
    """The spec of activations; None where they stay in float."""
    if not activations.quantized:
        return None
    kind = DataType.of(activations.bits, signed=False)
    ranges: dict[str, Any] = {name: getattr(activations, name) for name in ("calibration_method", "percentile")}
    return spec_class(kind)(
        data_type=kind,
        symmetric=activations.symmetric,
        quant_granularity=activations.granularity,
        group_size=activations.group_size,
        clip_ratio=activations.clip_ratio,
        **{key: value for key, value in ranges.items() if value is not None},
    )


def rounding_config(weights: Weights) -> RoundingConfig | None:
    """The rounding algorithm; None where weights stay in float."""
    if weights.resolved_bits == FLOAT_BITS:
        return None
    return ROUNDINGS[weights.resolved_method](mse=weights.clip, **weights.of_methods())


def _head_rules(
    recipe: Recipe, parts: Parts, head: Precision, written: OutputFormat | None
) -> list[tuple[QLayerConfig, list[str]]]:
    """A rule for each Linear of the head."""
    kind = Int8Spec if head is Precision.INT8 else Int4Spec
    if written is OutputFormat.NBITS:
        wanted = recipe.weights.group_size or _BLOCK
        rules = []
        for name, features in parts.head:
            divides = features % wanted == 0
            weight = kind(group_size=wanted) if divides else kind(quant_granularity=QuantGranularity.Channel)
            rules.append((QLayerConfig(weight=weight), [name]))
        return rules
    activation: QTensorConfig | None = None
    if recipe.activations.quantized:
        # Symmetric whatever the other activations are: integer kernels can do no other.
        activation = UInt8Spec(symmetric=True, quant_granularity=QuantGranularity.Token)
    eight = head is Precision.INT8
    spec = eight_bit_spec(recipe.weights.type, activation) if eight else Int4Spec()
    return [(QLayerConfig(activation=activation, weight=spec), [name for name, _ in parts.head])]


def _eight_bits(recipe: Recipe, written: OutputFormat | None) -> QLayerConfig:
    """8 bits, weights per channel or in float and activations per token, otherwise as the recipe has them."""
    weights, activations = recipe.weights, recipe.activations
    if not activations.quantized or written is OutputFormat.NBITS:
        return QLayerConfig(weight=eight_bit_spec(weights.type, None, symmetric=weights.symmetric))
    activation = UInt8Spec(
        symmetric=activations.symmetric, quant_granularity=QuantGranularity.Token, clip_ratio=activations.clip_ratio
    )
    in_float = weights.resolved_bits == FLOAT_BITS
    weight = None if in_float else eight_bit_spec(weights.type, activation, symmetric=weights.symmetric)
    return QLayerConfig(activation=activation, weight=weight)


def _table(recipe: Recipe, parts: Parts) -> QTensorConfig:
    """The spec of an embedding: 8 bits per row, or 4 bits in the largest groups that fit."""
    if recipe.embedding is Precision.INT8:
        return Int8Spec(symmetric=recipe.weights.symmetric, quant_granularity=QuantGranularity.Channel)
    sizes = [size for size in BLOCKS if size <= _BLOCK and parts.hidden is not None and parts.hidden % size == 0]
    return Int4Spec(group_size=max(sizes)) if sizes else Int4Spec()
