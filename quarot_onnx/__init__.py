"""QuaRot rotations and quantization for ONNX language models, run on stock onnxruntime.

The names below are imported when they are first used: a command that only reports an error need not wait for onnx.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quarot_onnx.config import (
        CalibMethod,
        GPTAQConfig,
        GPTQConfig,
        Int2Spec,
        Int3Spec,
        Int4Spec,
        Int5Spec,
        Int6Spec,
        Int7Spec,
        Int8Spec,
        Int16Spec,
        KVCacheConfig,
        OutputFormat,
        QConfig,
        QLayerConfig,
        QronosConfig,
        QuantGranularity,
        QuarotConfig,
        RTNConfig,
        ScaleType,
        SinkPrefixConfig,
        SmoothQuantConfig,
        UInt4Spec,
        UInt8Spec,
        UInt16Spec,
    )
    from quarot_onnx.evaluation.check import Check
    from quarot_onnx.evaluation.fidelity import Limits
    from quarot_onnx.quantizer import ModelQuantizer
    from quarot_onnx.run.optimizing import optimize

_HOMES = {
    "Check": "quarot_onnx.evaluation.check",
    "Limits": "quarot_onnx.evaluation.fidelity",
    "ModelQuantizer": "quarot_onnx.quantizer",
    "optimize": "quarot_onnx.run.optimizing",
}
"""What is no part of a configuration."""

__all__ = [
    "CalibMethod",
    "Check",
    "GPTAQConfig",
    "GPTQConfig",
    "Int2Spec",
    "Int3Spec",
    "Int4Spec",
    "Int5Spec",
    "Int6Spec",
    "Int7Spec",
    "Int8Spec",
    "Int16Spec",
    "KVCacheConfig",
    "Limits",
    "ModelQuantizer",
    "OutputFormat",
    "QConfig",
    "QLayerConfig",
    "QronosConfig",
    "QuantGranularity",
    "QuarotConfig",
    "RTNConfig",
    "ScaleType",
    "SinkPrefixConfig",
    "SmoothQuantConfig",
    "UInt4Spec",
    "UInt8Spec",
    "UInt16Spec",
    "optimize",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "quarot_onnx.config")), name)
