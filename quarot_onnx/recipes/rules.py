"""Settings of a recipe that contradict each other, refused in the words of whoever wrote them."""

from collections.abc import Iterator
from dataclasses import replace

from quarot_onnx.config.choices import Method, OutputFormat, Precision
from quarot_onnx.config.enums import CalibMethod, QuantGranularity
from quarot_onnx.config.formats import chosen, level_misfit, misfit, table_misfit
from quarot_onnx.config.misfits import (
    corrected_without_scale,
    groups_across_channels,
    order_across_groups,
    smoothing_float_inputs,
)
from quarot_onnx.config.numbers import FLOAT_BITS
from quarot_onnx.config.rounding import ROUNDINGS, HessianConfig
from quarot_onnx.config.spec import Int4Spec, QLayerConfig
from quarot_onnx.errors import ConfigError
from quarot_onnx.recipes.build import layer_config
from quarot_onnx.recipes.own import Recipe
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
    for check in (_bits, _type, _rounding, _groups, _activations, _format, _down):
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
    alone = recipe.kv_cache is None or not recipe.kv_cache.quantized
    if not recipe.activations.quantized and alone:
        yield f"{bits}: with 16 bits for weights and activations there is nothing to quantize; use {eight} or fewer"
    for name in sorted(weights.model_fields_set - {"bits", "method"}):
        yield f"{say.named(f'weights.{name}')}: weights of 16 bits stay in float; use {eight} or fewer, {_OUT}"


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
        if method in having:
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
    if weights.act_order and not weights.static_groups:
        yield say.refused(order_across_groups(weights.group_size))
    if not weights.per_channel:
        yield say.refused(groups_across_channels(weights.group_size))


def _activations(recipe: Recipe, say: Wording) -> Iterator[str]:
    activations = recipe.activations
    if recipe.smoothing is not None and not activations.quantized:
        yield say.refused(smoothing_float_inputs())
    if not activations.quantized:
        for name in sorted(activations.model_fields_set - {"bits"}):
            calibrated = name in {"calibration_method", "percentile", "bias_correction"}
            way = say.advised("activations.granularity", "tensor") if calibrated else say.advised("activations.bits", 8)
            yield f"{say.named(f'activations.{name}')}: activations stay in float; use {way}, {_OUT}"
    elif activations.granularity is QuantGranularity.Tensor and activations.group_size is not None:
        yield f"{say.named('activations.group_size')}: groups are within a token; use granularity token, {_OUT}"
    yield from _calibrated(recipe, say)


def _calibrated(recipe: Recipe, say: Wording) -> Iterator[str]:
    """What only activations with a fixed scale have."""
    activations = recipe.activations
    if activations.bias_correction and activations.granularity is not QuantGranularity.Tensor:
        yield say.refused(corrected_without_scale())
    for name in ("calibration_method", "percentile"):
        if getattr(activations, name) is None:
            continue
        here, fixed = say.named(f"activations.{name}"), say.advised("activations.granularity", "tensor")
        if activations.granularity is not QuantGranularity.Tensor:
            yield f"{here}: scales per token are not calibrated; use {fixed}, {_OUT}"
        elif name == "percentile" and activations.calibration_method is not CalibMethod.Percentile:
            yield f"{here}: add {say.advised('activations.calibration_method', 'percentile')}, {_OUT}"


def _format(recipe: Recipe, say: Wording) -> Iterator[str]:
    """What the format does not hold; one that was not named is chosen to hold all."""
    layer, named = layer_config(recipe), recipe.format
    if layer is None:
        return
    if named is not None and (found := misfit(layer, named)) is not None:
        yield say.refused(found)
    if named is OutputFormat.QDQ:
        four = Int4Spec()
        parts = {"lm_head": misfit(QLayerConfig(weight=four), named), "embedding": table_misfit(four, named)}
        for name, found in parts.items():
            if found is not None and getattr(recipe, name) is Precision.INT4:
                yield say.refused(replace(found, key=name, ways=((name, "int8"),)))
    if recipe.accuracy_level is not None:
        level = level_misfit(named or chosen(layer), quantized=layer.activation is not None)
        if level is not None:
            yield say.refused(level)


def _down(recipe: Recipe, say: Wording) -> Iterator[str]:
    weights, activations = recipe.weights, recipe.activations
    plain = weights.resolved_bits >= 8 and weights.group_size is None and activations.group_size is None
    if recipe.int8_down_proj and plain and activations.bits in {8, FLOAT_BITS}:
        what = "inputs" if weights.resolved_bits == FLOAT_BITS else "Linears"
        yield f"{say.named('int8_down_proj')}: all {what} have 8 bits already; leave it out"
