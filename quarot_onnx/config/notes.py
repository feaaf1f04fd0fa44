"""What a user should know about a configuration that is right but does not do all that it seems to say."""

from collections.abc import Sequence

from quarot_onnx.config.choices import OutputFormat
from quarot_onnx.config.data_type import DataType
from quarot_onnx.config.enums import CalibMethod
from quarot_onnx.config.formats import Placed, first_choice, misfit, table_misfit
from quarot_onnx.config.kernels import blocked_at_8_bits, saturable
from quarot_onnx.config.options import IGNORED
from quarot_onnx.config.rounding import HessianConfig, RoundingConfig
from quarot_onnx.config.spec import QLayerConfig
from quarot_onnx.config.storage import CHANNEL_BLOCK, blocked_bits
from quarot_onnx.processor import EXACT_PRODUCTS


def notes(
    ignored: Sequence[str],
    global_config: QLayerConfig | None,
    others: Sequence[QLayerConfig | None],
    percentile: float | None,
) -> tuple[str, ...]:
    """The notes on a configuration, a sentence each.

    Args:
        ignored: Names of options that change nothing here.
        global_config: The global layer configuration.
        others: The configurations of all rules.
        percentile: The value of the option Percentile.
    """
    configs = [config for config in (global_config, *others) if config is not None]
    activations = [config.activation for config in configs if config.activation is not None]
    found = [f"{name} has no effect: {IGNORED[name]}" for name in ignored]
    # Per token, integers are uint8 around 128 whatever the type is called: the same values.
    static = [spec for spec in activations if spec.has_fixed_scale]
    if any(spec.data_type is DataType.Int8 for spec in static):
        found.append("int8 activations run several times slower than uint8 on onnxruntime's CPU; use UInt8Spec")
    weights = [config.weight for config in configs if config.weight is not None]
    if any(spec.calibration_method is not CalibMethod.MinMax for spec in weights):
        found.append("the calibration method of a weight has no effect: weights take their true range")
    if percentile is not None and all(spec.calibration_method is not CalibMethod.Percentile for spec in activations):
        found.append("Percentile has no effect: no activation is calibrated by Percentile")
    quantizes_activations = global_config is not None and global_config.activation is not None
    if quantizes_activations and any(config is not None and config.activation is None for config in others):
        found.append("a rule without activation quantizes the weight only; it does not inherit the global activation")
    return tuple(found)


def rounding_notes(rounding: RoundingConfig, configs: Sequence[QLayerConfig | None]) -> tuple[str, ...]:
    """The notes on a rounding algorithm.

    Args:
        rounding: The algorithm.
        configs: The global layer configuration and those of all rules.
    """
    found = []
    if configs[0] is None or configs[0].weight is None:
        why = "there is no global_config" if configs[0] is None else "global_config leaves weights in float"
        given = ("bits", "group_size", "per_channel", "weight_symmetric")
        found += [
            f"{name} of {rounding.name} has no effect: {why}, and rules keep their own specs"
            for name in given
            if getattr(rounding, name) is not None
        ]
    if not isinstance(rounding, HessianConfig):
        return tuple(found)
    layers = [config for config in configs if config is not None]
    if rounding.enable_aq_calibration and all(layer.activation is None for layer in layers):
        found.append("enable_aq_calibration has no effect: no activation is quantized")
    weights = [layer.weight for layer in layers if layer.weight is not None]
    if rounding.aq_calibration and len(weights) < len(layers):
        found.append("while weights are rounded, inputs of Linears whose weights stay in float are not quantized")
    if rounding.static_groups and all(spec.group_size is None for spec in weights):
        found.append("static_groups has no effect: no weight has a group_size")
    return tuple(found)


def format_notes(
    placed: Sequence[Placed],
    given: OutputFormat | None,
    resolved: OutputFormat,
    accuracy_level: int | None,
) -> tuple[str, ...]:
    """The notes on the output format.

    Args:
        placed: All layer configurations.
        given: The format that the user named.
        resolved: The format that is written.
        accuracy_level: That of MatMulNBits.
    """
    found = _kernel_notes(placed, resolved, accuracy_level)
    if resolved is OutputFormat.QDQ:
        return found
    if resolved is not OutputFormat.FAKE:
        return found if given is OutputFormat.W8 else (*found, *_storage_notes(placed, resolved, accuracy_level))
    deciding = next((item.config for item in placed if item.linear), None)
    if given is not None or deciding is None:
        return ()
    why = "weights stay in float"
    if deciding.weight is not None:
        first = first_choice(deciding)
        reason = misfit(deciding, first)
        assert reason is not None, "what its first choice holds is not fake"
        why = reason.why
    return (f"the format fake was chosen, as {why}: float32 for studies, no smaller and no faster",)


def _kernel_notes(placed: Sequence[Placed], resolved: OutputFormat, accuracy_level: int | None) -> tuple[str, ...]:
    """What onnxruntime's kernels do to the result on some processors, or on all."""
    found = []
    configs = [item.config for item in placed if item.linear]
    if any(saturable(config, resolved) for config in configs):
        found.append(
            "int8 weights beside 8-bit activations: on x86 processors without VNNI onnxruntime's products saturate and "
            "the model gets worse; UInt8Spec weights (--weight-type uint8) are exact on all, and so is onnxruntime's "
            f"session option {EXACT_PRODUCTS}=1"
        )
    if accuracy_level is None and any(blocked_at_8_bits(config, resolved) for config in configs):
        way = "; its session option session.qdq_matmulnbits_accuracy_level=1 keeps them in float, slowly"
        found.append(
            "8-bit weights alone: onnxruntime computes with accuracy level 4, which rounds activations to 8 bits per "
            f"block of a row{way if resolved is OutputFormat.QDQ else ''}"
        )
    return tuple(found)


def _storage_notes(placed: Sequence[Placed], resolved: OutputFormat, accuracy_level: int | None) -> tuple[str, ...]:
    """The note on weights that take more bits than they have; not for one who names W8, and knows."""
    # What could be an embedding is stored in the bits that it has.
    linears = [
        item
        for item in placed
        if item.linear and not (item.table and table_misfit(item.config.weight, resolved) is None)
    ]
    weights = [item.config.weight for item in linears if item.config.weight is not None]
    stored = {
        (w.bits, blocked_bits(w.bits, resolved, accuracy_level=accuracy_level, block=w.group_size or CHANNEL_BLOCK))
        for w in weights
    }
    wider = sorted((bits, taken) for bits, taken in stored if bits < taken)
    if not wider:
        return ()
    taken = wider[-1][1]
    named = " and ".join(f"{bits}-bit" for bits, _ in wider)
    integers = taken == 8 and any(item.config.activation is not None for item in linears)
    gain = ", as fast as int8 and exact on every processor" if integers else ""
    return (f"{named} weights are stored in {taken} bits by {resolved}: no smaller than {taken}-bit ones{gain}",)
