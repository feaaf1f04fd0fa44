"""Which output format holds what a configuration asks for, and which it takes when none is named.

================ =============================== ==================================== ==============================
format           weights of Linears              activations                          else
================ =============================== ==================================== ==============================
QDQ              8 bits, per channel or tensor   8 bits, static or symmetric per      outputs, clip_ratio
                                                 token, or none
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
from quarot_onnx.config.data_type import DataType
from quarot_onnx.config.enums import OpType, QuantGranularity
from quarot_onnx.config.rules import LayerRule
from quarot_onnx.config.spec import QLayerConfig
from quarot_onnx.config.tensor import QTensorConfig

BLOCKS = (16, 32, 64, 128, 256)
"""The group sizes that onnxruntime's MatMulNBits and GatherBlockQuantized know."""

GLOBAL = "global_config"

_BLOCKS = "16, 32, 64, 128 or 256"
_OUT = "or leave it out"


@dataclass(frozen=True)
class Misfit:
    """What a format cannot hold.

    Attributes:
        why: The reason, in words that files, options and Python share.
        way_out: What to do in Python and in a file.
    """

    why: str
    way_out: str

    def __str__(self) -> str:
        """Both, as errors have them."""
        return f"{self.why}; {self.way_out}"


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


def saturable(config: QLayerConfig, output_format: OutputFormat) -> bool:
    """Whether products saturate on processors without VNNI: those of int8 weights of 8 bits and uint8 activations.

    Args:
        config: How a Linear is quantized.
        output_format: As `resolved` has it.
    """
    return _beside_uint8(config, output_format) is DataType.Int8


def widened(config: QLayerConfig, output_format: OutputFormat) -> bool:
    """Whether products are exact on all processors, but slower without VNNI: those of uint8 weights of 8 bits.

    Args:
        config: How a Linear is quantized.
        output_format: As `resolved` has it.
    """
    return _beside_uint8(config, output_format) is DataType.UInt8


def _beside_uint8(config: QLayerConfig, output_format: OutputFormat) -> DataType | None:
    """The type of the weights that onnxruntime multiplies with uint8 activations; None where it does not."""
    weight, activation = config.weight, config.activation
    if output_format in {OutputFormat.NBITS, OutputFormat.FAKE} or weight is None or activation is None:
        return None
    # Per token, activations are uint8 around 128 whatever the type is called.
    unsigned = activation.quant_granularity is QuantGranularity.Token or not activation.data_type.signed
    return weight.data_type if unsigned else None


def blocked_at_8_bits(config: QLayerConfig, output_format: OutputFormat) -> bool:
    """Whether a Linear runs as MatMulNBits of 8 bits, which rounds activations to 8 bits per block of a row."""
    weight = config.weight
    if weight is None or config.activation is not None:
        return False
    return weight.bits > 4 and output_format is not OutputFormat.FAKE


def is_new(config: QLayerConfig) -> bool:
    """Whether a configuration asks for more than 8-bit Q/DQ."""
    weight, activation = config.weight, config.activation
    if weight is None or weight.bits < 8 or weight.group_size is not None:
        return True
    return activation is not None and (_activation_misfit(activation) is not None or activation.clip_ratio < 1)


def first_choice(config: QLayerConfig) -> OutputFormat:
    """The format that suits a configuration, if it can hold it."""
    if config.weight is None:
        return OutputFormat.FAKE
    if config.activation is None:
        return OutputFormat.NBITS
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
        return Misfit(
            "output_tensors goes only with plain 8-bit Q/DQ", "leave it out, or leave out rounding and output_format"
        )
    if output_format is OutputFormat.FAKE:
        return None
    weight = config.weight
    if weight is None:
        return Misfit(
            "activations beside weights in float need fake",
            "use output_format='fake', give a weight, or exclude the nodes to leave all in float",
        )
    if output_format is OutputFormat.NBITS:
        return _nbits_misfit(config, weight)
    if weight.group_size is not None:
        return Misfit(f"group_size={weight.group_size} of the weight needs nbits or fake", f"use one of them, {_OUT}")
    reason = None
    if output_format is OutputFormat.W4A8:
        reason = _w4a8_misfit(config, weight, single=single)
    elif output_format is OutputFormat.QDQ and weight.bits < 8:
        reason = Misfit(f"weights have 8 bits there, not {weight.bits}", "use w8, w4a8 or nbits, or name none")
    return reason if reason or config.activation is None else _activation_misfit(config.activation)


def _described(weight: QTensorConfig | None) -> str:
    return "None" if weight is None else weight.described()


def _nbits_misfit(config: QLayerConfig, weight: QTensorConfig) -> Misfit | None:
    if config.activation is not None:
        return Misfit(
            "activations are not quantized there", "leave out activation and use accuracy_level=4 for int8 activations"
        )
    if weight.group_size not in (None, *BLOCKS):
        return Misfit(f"group_size={weight.group_size} of the weight is none of {_BLOCKS}", "use one of them, or fake")
    return None


def _w4a8_misfit(config: QLayerConfig, weight: QTensorConfig, *, single: bool) -> Misfit | None:
    if weight.bits > 4:
        why = f"the weight has {weight.bits} bits"
        return None if single else Misfit(why, "use w8, or a weight of 4 bits or fewer")
    if weight.quant_granularity is not QuantGranularity.Channel:
        return Misfit("weights of 4 bits or fewer are per channel there", "use quant_granularity='Channel', w8 or fake")
    if config.activation is None:
        return Misfit(
            "it needs 8-bit activations", "give activation=UInt8Spec(True, quant_granularity='Token'), or use nbits"
        )
    return None


def _activation_misfit(spec: QTensorConfig) -> Misfit | None:
    """Why onnxruntime cannot compute with an activation in integers."""
    if spec.bits < 8:
        return Misfit(f"activations have 8 bits there, not {spec.bits}", "use fake, or UInt8Spec")
    if spec.group_size is not None:
        return Misfit(f"group_size={spec.group_size} of the activation needs fake", f"use it, {_OUT}")
    if spec.quant_granularity is QuantGranularity.Token and not spec.symmetric:
        return Misfit("asymmetric per-token activations need fake", "use it, or symmetric=True")
    return None


def table_misfit(weight: QTensorConfig | None, output_format: OutputFormat) -> Misfit | None:
    """Why the table of an embedding cannot be stored so; None where it can."""
    rule = "layer_type_config={...: ['Gather']}"
    if weight is None:
        return Misfit(
            "embeddings have no activation to quantize", f"leave out Gather, or give them a rule with a weight: {rule}"
        )
    if output_format is OutputFormat.QDQ and weight.bits != 8:
        return Misfit(f"embeddings have 8 bits there, not {weight.bits}", "use 8, or name another format")
    if weight.bits not in {4, 8}:
        return Misfit(f"embeddings have 4 or 8 bits, not {weight.bits}", f"give them a rule: {rule}")
    if weight.bits == 8 and weight.group_size is not None:
        return Misfit("8-bit embeddings are per Channel (row)", f"leave out group_size, or give them a rule: {rule}")
    if weight.group_size not in (None, *BLOCKS):
        return Misfit(f"4-bit embeddings have a group_size of {_BLOCKS}, not {weight.group_size}", "use one of them")
    return None
