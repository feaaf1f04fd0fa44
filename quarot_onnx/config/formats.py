"""Which output format holds what a configuration asks for, and which it takes when none is named.

================ =============================== ==================================== ==============================
format           weights of Linears              activations                          else
================ =============================== ==================================== ==============================
QDQ              8 bits, per channel or tensor;  8 bits, static or symmetric per      outputs, clip_ratio
                 4 beside static activations     token, or none; 16 bits, static
W4A8             2 to 4 bits per channel; of     8 bits, static or symmetric per      clip_ratio
                 single layers more              token
NBITS            any, groups of 16 to 256        none                                 accuracy_level
W8               any, per channel or tensor      8 bits, static or symmetric per      clip_ratio
                                                 token, or none
FAKE             any, or in float                any; not none for weights in float   clip_ratio
================ =============================== ==================================== ==============================

Embeddings are stored alike in all formats: 8 bits per row or tensor and, but for QDQ, 4 bits per row or in groups of 16
to 256.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quarot_onnx.config.choices import OutputFormat
from quarot_onnx.config.enums import OpType, QuantGranularity
from quarot_onnx.config.misfits import Misfit
from quarot_onnx.config.rules import LayerRule
from quarot_onnx.config.spec import QLayerConfig
from quarot_onnx.config.tensor import QTensorConfig

BLOCKS = (16, 32, 64, 128, 256)
"""The group sizes that onnxruntime's MatMulNBits and GatherBlockQuantized know."""

GLOBAL = "global_config"

_BLOCKS = "16, 32, 64, 128 or 256"


@dataclass(frozen=True)
class Placed:
    """A layer configuration and where it stands.

    Attributes:
        place: For messages: ``global_config`` or ``specific_layer_config[0]``.
        config: The configuration.
        linear: Whether it can concern a MatMul or Gemm.
        table: Whether it can concern the Gather of an embedding.
        by_name: Whether nodes are named, of which only the graph knows which of the two they are.
    """

    place: str
    config: QLayerConfig
    linear: bool
    table: bool
    by_name: bool = False

    def misfit(self, output_format: OutputFormat) -> Misfit | None:
        """Why the format cannot hold it; None where it can."""
        single = self.place != GLOBAL
        reasons = [misfit(self.config, output_format, single=single)] if self.linear else []
        reasons += [table_misfit(self.config.weight, output_format)] if self.table else []
        if self.by_name and None in reasons:
            return None
        return next((reason for reason in reasons if reason is not None), None)


def placed(
    global_config: QLayerConfig | None,
    specific: Sequence[LayerRule],
    by_type: Sequence[LayerRule],
    op_types: Sequence[OpType],
) -> list[Placed]:
    """All layer configurations of a `QConfig`, the global one first; arguments are its fields."""
    typed = [(number, rule, rule.config) for number, rule in enumerate(by_type) if rule.config is not None]
    tables = OpType.Gather in op_types or any(OpType.Gather in rule.layers for _, rule, _ in typed)
    ruled = any(OpType.Gather in rule.layers for rule in by_type)
    found = []
    if global_config is not None:
        linear = any(item is not OpType.Gather for item in op_types)
        found.append(Placed(GLOBAL, global_config, linear=linear, table=OpType.Gather in op_types and not ruled))
    for number, rule in enumerate(specific):
        if rule.config is not None:
            place = f"specific_layer_config[{number}]"
            found.append(Placed(place, rule.config, linear=True, table=tables, by_name=True))
    for number, rule, config in typed:
        linear = any(name != OpType.Gather for name in rule.layers)
        place = f"layer_type_config[{number}]"
        found.append(Placed(place, config, linear=linear, table=OpType.Gather in rule.layers))
    return found


def resolved(found: Sequence[Placed], given: OutputFormat | None, *, rounds: bool) -> OutputFormat:
    """The format that is written.

    Args:
        found: From `placed`.
        given: What the user named.
        rounds: Whether a rounding algorithm runs.

    Returns:
        The format; QDQ when none was named and nothing asks for more.
    """
    if given is not None:
        return given
    if not rounds and not any(is_new(item.config) for item in found):
        return OutputFormat.QDQ
    deciding = next((item.config for item in found if item.linear), None)
    return OutputFormat.NBITS if deciding is None else chosen(deciding)


def refuse_misfits(found: Sequence[Placed], output_format: OutputFormat, *, named: bool) -> None:
    """Raise ValueError for the first configuration that the format cannot hold.

    Args:
        found: From `placed`.
        output_format: The format.
        named: Whether the user named it.
    """
    source = "" if named else f" (chosen for {next((item.place for item in found if item.linear), 'embeddings')})"
    for item in found:
        if reason := item.misfit(output_format):
            raise ValueError(
                f"output_format={output_format}{source} does not take {item.place} "
                f"with weight={_described(item.config.weight)}: {reason}"
            )


def is_new(config: QLayerConfig) -> bool:
    """Whether a configuration asks for more than 8-bit Q/DQ."""
    weight, activation = config.weight, config.activation
    if weight is None or weight.bits < 8 or weight.group_size is not None:
        return True
    return activation is not None and (
        _activation_misfit(activation, OutputFormat.QDQ) is not None or activation.clip_ratio < 1
    )


def first_choice(config: QLayerConfig) -> OutputFormat:
    """The format that suits a configuration, if it can hold it."""
    if config.weight is None:
        return OutputFormat.FAKE
    if config.activation is None:
        return OutputFormat.NBITS
    if config.activation.bits > 8:
        return OutputFormat.QDQ
    return OutputFormat.W4A8 if config.weight.bits <= 4 else OutputFormat.W8


def chosen(config: QLayerConfig) -> OutputFormat:
    """The format for a configuration that names none: FAKE where its first choice cannot hold it."""
    first = first_choice(config)
    return first if misfit(config, first) is None else OutputFormat.FAKE


def misfit(config: QLayerConfig, output_format: OutputFormat, *, single: bool = False) -> Misfit | None:
    """Why a format cannot hold a Linear; None where it can.

    Args:
        config: How the Linear is quantized.
        output_format: The format.
        single: Whether this is a rule for single layers beside a global configuration.
    """
    if config.output_tensors is not None and output_format is not OutputFormat.QDQ:
        return Misfit("output_tensors", f"{output_format} leaves outputs in float", (_format(OutputFormat.QDQ),))
    if output_format is OutputFormat.FAKE:
        return None
    weight, activation = config.weight, config.activation
    if weight is None:
        why = f"{output_format} does not hold activations beside weights in float"
        return Misfit("format", why, (_format(OutputFormat.FAKE), ("weights.bits", 8)))
    if output_format is OutputFormat.NBITS:
        return _nbits_misfit(config, weight)
    if weight.group_size is not None:
        ways = (_format(OutputFormat.NBITS),) if activation is None else ()
        why = f"{output_format} has a scale per channel"
        return Misfit("weights.group_size", why, (*ways, _format(OutputFormat.FAKE)))
    found = None
    if output_format is OutputFormat.W4A8:
        found = _w4a8_misfit(config, weight, single=single)
    elif output_format is OutputFormat.QDQ and weight.bits < 8 and not _is_int4_beside_fixed(weight, activation):
        wide = OutputFormat.NBITS if activation is None else OutputFormat.W8
        these = f"not {weight.bits}" if weight.bits != 4 else "which these have not"
        why = f"qdq holds weights of 8 bits, and of 4 beside activations with a fixed scale, {these}"
        found = Misfit("format", why, (_format(wide),))
    return found if found or activation is None else _activation_misfit(activation, output_format)


def _is_int4_beside_fixed(weight: QTensorConfig, activation: QTensorConfig | None) -> bool:
    """Whether a Linear is one of 4 bits that Q/DQ holds."""
    return weight.bits == 4 and activation is not None and activation.has_fixed_scale


def level_misfit(output_format: OutputFormat, *, quantized: bool) -> Misfit | None:
    """Why a format has no accuracy level; None where it has.

    Args:
        output_format: The format.
        quantized: Whether it holds quantized activations.
    """
    if output_format is OutputFormat.NBITS:
        return None
    if quantized:
        why = f"only nbits has it, which leaves activations in float, not {output_format}"
        return Misfit("accuracy_level", why, (("activations.bits", 16),))
    return Misfit("accuracy_level", f"only nbits has it, not {output_format}", (_format(OutputFormat.NBITS),))


def table_misfit(weight: QTensorConfig | None, output_format: OutputFormat) -> Misfit | None:
    """Why the table of an embedding cannot be stored so; None where it can."""
    apart = (("embedding", "by itself"),)
    if weight is None:
        return Misfit("embedding", "embeddings have no activation to quantize", apart)
    if output_format is OutputFormat.QDQ and weight.bits != 8:
        return Misfit("embedding", f"qdq holds embeddings of 8 bits, not {weight.bits}", (("embedding", "int8"),))
    if weight.bits not in {4, 8}:
        return Misfit("embedding", f"embeddings have 4 or 8 bits, not {weight.bits}", apart)
    if weight.bits == 8 and weight.group_size is not None:
        return Misfit("embedding", "8-bit embeddings are per Channel (row), not in groups", apart)
    if weight.group_size not in (None, *BLOCKS):
        why = f"4-bit embeddings have a group_size of {_BLOCKS}, not {weight.group_size}"
        return Misfit("embedding", why, apart)
    return None


def _format(wanted: OutputFormat) -> tuple[str, object]:
    return "format", wanted.value


def _described(weight: QTensorConfig | None) -> str:
    return "None" if weight is None else weight.described()


def _nbits_misfit(config: QLayerConfig, weight: QTensorConfig) -> Misfit | None:
    if config.activation is not None:
        why = "nbits leaves activations in float (accuracy level 4 rounds them to int8 as it computes)"
        return Misfit("format", why, (("activations.bits", 16),))
    if weight.group_size not in (None, *BLOCKS):
        why = f"nbits has groups of {_BLOCKS}, not {weight.group_size}"
        return Misfit("weights.group_size", why, (_format(OutputFormat.FAKE),))
    return None


def _w4a8_misfit(config: QLayerConfig, weight: QTensorConfig, *, single: bool) -> Misfit | None:
    if weight.bits > 4:
        why = f"w4a8 holds weights of up to 4 bits, not {weight.bits}"
        return None if single else Misfit("format", why, (_format(OutputFormat.W8),))
    if weight.quant_granularity is not QuantGranularity.Channel:
        ways = (_format(OutputFormat.W8), _format(OutputFormat.FAKE))
        return Misfit("weights.per_channel", "w4a8 has a scale per channel", ways)
    if config.activation is None:
        ways = (("activations.bits", 8), _format(OutputFormat.NBITS))
        return Misfit("format", "w4a8 needs 8-bit activations", ways)
    return None


def _activation_misfit(spec: QTensorConfig, output_format: OutputFormat) -> Misfit | None:
    """Why onnxruntime cannot compute with an activation in integers."""
    fake = _format(OutputFormat.FAKE)
    if spec.bits < 8:
        why = f"{output_format} has activations of 8 bits, not {spec.bits}"
        return Misfit("activations.bits", why, (fake, ("activations.bits", 8)), droppable=False)
    if spec.bits > 8 and output_format is not OutputFormat.QDQ:
        why = f"{output_format} has activations of 8 bits, not {spec.bits}"
        return Misfit("format", why, (_format(OutputFormat.QDQ), ("activations.bits", 8)))
    if spec.group_size is not None:
        return Misfit("activations.group_size", f"{output_format} has one scale per token", (fake,))
    if not spec.has_fixed_scale and not spec.symmetric:
        why = f"{output_format} has symmetric activations per token"
        fixed = (("activations.granularity", "tensor"),) if output_format is OutputFormat.QDQ else ()
        return Misfit("activations.symmetric", why, (*fixed, fake))
    return None
