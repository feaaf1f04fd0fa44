"""Quark's model-wide options that change specs: symmetry, percentile, weights only.

What a spec sets itself wins over them; in the global config, where both are meant for the same tensors, a
contradiction is an error.
"""

from dataclasses import dataclass

from quarot_onnx.quantization.config.enums import CalibMethod
from quarot_onnx.quantization.config.spec import QLayerConfig, QTensorConfig


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
            config = config.model_copy(update={"activation": None, "output_tensors": None})
        return config.model_copy(
            update={
                "activation": self._activation(config.activation),
                "output_tensors": self._activation(config.output_tensors),
                "weight": _with_defaults(config.weight, symmetric=self.weight_symmetric),
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


def _with_defaults(spec: QTensorConfig, **values: object) -> QTensorConfig:
    """The spec with the values that it does not set itself; None is no value."""
    unset = {key: value for key, value in values.items() if value is not None and key not in spec.model_fields_set}
    return spec.model_copy(update=unset) if unset else spec
