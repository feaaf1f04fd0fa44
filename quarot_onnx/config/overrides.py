"""What changes specs from outside: Quark's model-wide options, and the grid that a rounding algorithm names.

What a spec sets itself wins over the options (symmetry, percentile, weights only); in the global config, where both
are meant for the same tensors, a contradiction is an error. The grid of an algorithm is for the global weight alone.
"""

from dataclasses import dataclass

from quarot_onnx.config.enums import CalibMethod, QuantGranularity
from quarot_onnx.config.rounding import RoundingConfig
from quarot_onnx.config.spec import QLayerConfig, QTensorConfig


@dataclass(frozen=True)
class Overrides:
    """The options; None, or False for the last, changes nothing."""

    activation_symmetric: bool | None
    weight_symmetric: bool | None
    percentile: float | None
    weights_only: bool

    def refuse_contradiction(self, config: QLayerConfig | None) -> None:
        """Raise ValueError where a spec of the global config sets something else than an option does."""
        if config is None:
            return
        wanted = (
            ("ActivationSymmetric", config.activation, "symmetric", self.activation_symmetric),
            ("WeightSymmetric", config.weight, "symmetric", self.weight_symmetric),
            ("Percentile", config.activation, "percentile", self.percentile),
        )
        for option, spec, field, value in wanted:
            if spec is None or value is None or field not in spec.model_fields_set:
                continue
            if getattr(spec, field) != value:
                raise ValueError(
                    f"{option}={value} contradicts {field}={getattr(spec, field)} of global_config; give one of them"
                )

    def apply(self, config: QLayerConfig | None) -> QLayerConfig | None:
        """The configuration with the options written into its specs."""
        if config is None:
            return None
        if self.weights_only:
            if config.weight is None:
                raise ValueError(
                    "WeightsOnly=True leaves nothing to quantize of a config with weight=None; give a weight, or None "
                    "in place of the config"
                )
            config = config.model_copy(update={"activation": None, "output_tensors": None})
        weight = config.weight
        return config.model_copy(
            update={
                "activation": self._activation(config.activation),
                "output_tensors": self._activation(config.output_tensors),
                "weight": None if weight is None else _with_defaults(weight, symmetric=self.weight_symmetric),
            }
        )

    def _activation(self, spec: QTensorConfig | None) -> QTensorConfig | None:
        if spec is None:
            return None
        method = None if self.percentile is None else CalibMethod.Percentile
        spec = _with_defaults(spec, symmetric=self.activation_symmetric, calibration_method=method)
        if spec.calibration_method is CalibMethod.Percentile:
            spec = _with_defaults(spec, percentile=self.percentile)
        return spec


def rounded_as(rounding: RoundingConfig, config: QLayerConfig) -> QLayerConfig:
    """The global configuration with the grid of a rounding algorithm written into its weight spec, if it has one.

    Raises:
        ValueError: The weight spec sets something else itself; names both.
    """
    spec, owner = config.weight, f"{type(rounding).__name__}"
    if spec is None:
        return config
    if rounding.bits not in (None, spec.bits):
        raise ValueError(
            f"bits={rounding.bits} of {owner} contradicts weight={type(spec).__name__}(...) of global_config; "
            f"use weight=Int{rounding.bits}Spec(...), or leave out bits"
        )
    wanted = {"symmetric": rounding.weight_symmetric, **_grid(rounding, spec)}
    names = {"symmetric": "weight_symmetric", "group_size": "group_size", "quant_granularity": "per_channel"}
    changed = {key: value for key, value in wanted.items() if value is not None and getattr(spec, key) != value}
    for key in sorted(changed.keys() & spec.model_fields_set):
        # A group size says all; the granularity only follows from it.
        name = "group_size" if "group_size" in changed else names[key]
        stated = getattr(spec, key).name if key == "quant_granularity" else getattr(spec, key)
        raise ValueError(
            f"{name}={getattr(rounding, name)} of {owner} contradicts {key}={stated} "
            "of the weight in global_config; give one of them"
        )
    return config.model_copy(update={"weight": spec.model_copy(update=changed)}) if changed else config


def _grid(rounding: RoundingConfig, spec: QTensorConfig) -> dict[str, object]:
    """The granularity that a rounding algorithm names."""
    if rounding.group_size is not None:
        return {"quant_granularity": QuantGranularity.Group, "group_size": rounding.group_size}
    if rounding.per_channel is None or (rounding.per_channel and spec.group_size is not None):
        return {}  # groups lie within channels
    return {"quant_granularity": QuantGranularity.Channel if rounding.per_channel else QuantGranularity.Tensor}


def _with_defaults(spec: QTensorConfig, **values: object) -> QTensorConfig:
    """The spec with the values that it does not set itself; None is no value."""
    unset = {key: value for key, value in values.items() if value is not None and key not in spec.model_fields_set}
    return spec.model_copy(update=unset) if unset else spec
