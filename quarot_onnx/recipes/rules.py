"""Settings of a recipe that contradict each other, refused in the words of whoever wrote them."""

from collections.abc import Iterator

from quarot_onnx.config.choices import Method, OutputFormat, Precision
from quarot_onnx.config.enums import CalibMethod, QuantGranularity
from quarot_onnx.config.formats import BLOCKS
from quarot_onnx.config.rounding import ROUNDINGS, HessianConfig
from quarot_onnx.errors import ConfigError
from quarot_onnx.recipes.own import FLOAT_BITS, Recipe
from quarot_onnx.recipes.wording import Wording

_OUT = "or leave it out"


def refuse_contradictions(recipe: Recipe, wording: Wording) -> None:
    """Refuse a recipe that cannot be carried out, before a model is looked at.

    Args:
        recipe: What to quantize.
        wording: Whose words errors use.

    Raises:
        ConfigError: Naming the setting, why it cannot be, and the way out.
    """
    for check in (_bits, _type, _rounding, _groups, _activations, _plain, _format, _level, _down):
        for message in check(recipe, wording):
            raise ConfigError(message)


def _bits(recipe: Recipe, say: Wording) -> Iterator[str]:
    weights, eight = recipe.weights, say.advised("weights.bits", 8)
    if weights.resolved_bits < FLOAT_BITS:
        return
    bits = say.named("weights.bits")
    if weights.method is not None:
        rounding = say.named("weights.method")
        yield f"{rounding}: weights of 16 bits stay in float and are not rounded; use {eight} or fewer, {_OUT}"
    if not recipe.activations.quantized:
        yield f"{bits}: with 16 bits for weights and activations there is nothing to quantize; use {eight} or fewer"
    for name in sorted(weights.model_fields_set - {"bits", "method"}):
        yield f"{say.named(f'weights.{name}')}: weights of 16 bits stay in float; use {eight} or fewer, {_OUT}"
    if recipe.format not in {None, OutputFormat.FAKE}:
        here, fake = say.named("format"), say.advised("format", "fake")
        yield f"{here}: activations beside weights of 16 bits, which stay in float, need {fake}; use it, {_OUT}"


def _type(recipe: Recipe, say: Wording) -> Iterator[str]:
    weights = recipe.weights
    if weights.type is None:
        return
    here, eight = say.named("weights.type"), say.advised("weights.bits", 8)
    if not (weights.resolved_bits == 8 or recipe.int8_down_proj or recipe.lm_head is Precision.INT8):
        yield f"{here}: no weight has 8 bits; use {eight}, {_OUT}"
    elif recipe.format is OutputFormat.QDQ:
        return
    elif not recipe.activations.quantized or recipe.format in {OutputFormat.NBITS, OutputFormat.FAKE}:
        yield f"{here}: it matters beside 8-bit activations alone; add {say.advised('activations.bits', 8)}, {_OUT}"


def _rounding(recipe: Recipe, say: Wording) -> Iterator[str]:
    weights, method = recipe.weights, recipe.weights.resolved_method
    default = "" if weights.method is not None else f", the default at {weights.resolved_bits} bits"
    for name in weights.of_methods():
        here = say.named(f"weights.{name}")
        having = [each for each, config in ROUNDINGS.items() if name in config.model_fields]
        if getattr(weights, name) in {None, False} or method in having:
            continue
        if method is Method.RTN and name in HessianConfig.model_fields:
            other = say.advised("weights.method", "gptq")
            yield f"{here}: not for rounding to nearest (rtn{default}); use {other}, {_OUT}"
        else:
            other = say.advised("weights.method", having[-1])
            yield f"{here}: only {' and '.join(having)} have it, not {method}{default}; use {other}, {_OUT}"


def _groups(recipe: Recipe, say: Wording) -> Iterator[str]:
    weights = recipe.weights
    if weights.group_size is None:
        return
    size = f"groups of {weights.group_size}"
    if weights.act_order and not weights.static_groups:
        static = say.advised("weights.static_groups", True)  # noqa: FBT003 - a value
        yield f"{say.named('weights.act_order')}: with {size} it needs static groups; add {static}, {_OUT}"
    if not weights.per_channel:
        yield f"{say.named('weights.per_channel')}: {size} lie within channels; leave out one of them"


def _activations(recipe: Recipe, say: Wording) -> Iterator[str]:
    activations = recipe.activations
    if not activations.quantized:
        for name in sorted(activations.model_fields_set - {"bits"}):
            calibrated = name in {"calibration_method", "percentile"}
            way = say.advised("activations.granularity", "tensor") if calibrated else say.advised("activations.bits", 8)
            yield f"{say.named(f'activations.{name}')}: activations stay in float; use {way}, {_OUT}"
    elif activations.granularity is QuantGranularity.Tensor and activations.group_size is not None:
        yield f"{say.named('activations.group_size')}: groups are within a token; use granularity token, {_OUT}"
    yield from _calibrated(recipe, say)


def _calibrated(recipe: Recipe, say: Wording) -> Iterator[str]:
    """What only activations with a fixed scale have."""
    activations = recipe.activations
    for name in ("calibration_method", "percentile"):
        if getattr(activations, name) is None:
            continue
        here, fixed = say.named(f"activations.{name}"), say.advised("activations.granularity", "tensor")
        if activations.granularity is not QuantGranularity.Tensor:
            yield f"{here}: scales per token are not calibrated; use {fixed}, {_OUT}"
        elif name == "percentile" and activations.calibration_method is not CalibMethod.Percentile:
            yield f"{here}: add {say.advised('activations.calibration_method', 'percentile')}, {_OUT}"


def _format(recipe: Recipe, say: Wording) -> Iterator[str]:
    found, weights, activations = recipe.format, recipe.weights, recipe.activations
    if found is None or found is OutputFormat.FAKE:
        return
    here, fake = say.named("format"), say.advised("format", "fake")
    blocked = say.advised("format", "nbits")
    if found is OutputFormat.NBITS:
        if activations.quantized:
            level = say.advised("accuracy_level", 4)
            float_bits = say.advised("activations.bits", FLOAT_BITS)
            yield f"{here}: nbits leaves activations in float; use {float_bits} ({level} computes with int8), {_OUT}"
        if weights.group_size not in (None, *BLOCKS):
            known = ", ".join(map(str, BLOCKS))
            yield f"{say.named('weights.group_size')}: nbits has groups of {known}; use one of them, or {fake}"
        return
    if weights.group_size is not None:
        yield f"{say.named('weights.group_size')}: {found} has a scale per channel; use {blocked} or {fake}, {_OUT}"
    if found is OutputFormat.W4A8:
        if weights.resolved_bits > 4:
            wide = say.advised("format", "w8")
            yield f"{here}: w4a8 holds weights of up to 4 bits, not {weights.resolved_bits}; use {wide}"
        if not activations.quantized:
            yield f"{here}: w4a8 needs 8-bit activations; add {say.advised('activations.bits', 8)}, or use {blocked}"
        if not weights.per_channel:
            yield f"{say.named('weights.per_channel')}: w4a8 has a scale per channel; use {fake}, {_OUT}"
    yield from _integer_activations(recipe, say)


def _plain(recipe: Recipe, say: Wording) -> Iterator[str]:
    """What plain Q/DQ does not hold."""
    if recipe.format is not OutputFormat.QDQ:
        return
    bits = recipe.weights.resolved_bits
    if bits < 8:
        wide = say.advised("format", "w8" if recipe.activations.quantized else "nbits")
        yield f"{say.named('format')}: qdq holds weights of 8 bits, not {bits}; use {wide}, {_OUT}"
    for name in ("lm_head", "embedding"):
        if getattr(recipe, name) is Precision.INT4:
            yield f"{say.named(name)}: qdq has 8 bits; use {say.advised(name, 'int8')}, {_OUT}"


def _integer_activations(recipe: Recipe, say: Wording) -> Iterator[str]:
    """Why onnxruntime cannot compute with the activations in integers."""
    found, activations = recipe.format, recipe.activations
    if not activations.quantized:
        return
    way = f"use {say.advised('format', 'fake')}"
    if activations.bits < 8:
        yield f"{say.named('activations.bits')}: {found} has activations of 8 bits, not {activations.bits}; {way}"
    if activations.group_size is not None:
        yield f"{say.named('activations.group_size')}: {found} has one scale per token; {way}, {_OUT}"
    if not activations.symmetric and activations.granularity is QuantGranularity.Token:
        if found is OutputFormat.QDQ:
            way = f"use {say.advised('activations.granularity', 'tensor')}"
        yield f"{say.named('activations.symmetric')}: {found} has symmetric activations per token; {way}, {_OUT}"


def _level(recipe: Recipe, say: Wording) -> Iterator[str]:
    others = recipe.format not in {None, OutputFormat.NBITS}
    if recipe.accuracy_level is not None and (others or recipe.activations.quantized):
        nbits = say.advised("format", "nbits")
        yield f"{say.named('accuracy_level')}: only nbits has it, with activations in float; use {nbits}, {_OUT}"


def _down(recipe: Recipe, say: Wording) -> Iterator[str]:
    weights, activations = recipe.weights, recipe.activations
    plain = weights.resolved_bits >= 8 and weights.group_size is None and activations.group_size is None
    if recipe.int8_down_proj and plain and activations.bits in {8, FLOAT_BITS}:
        what = "inputs" if weights.resolved_bits == FLOAT_BITS else "Linears"
        yield f"{say.named('int8_down_proj')}: all {what} have 8 bits already; leave it out"
