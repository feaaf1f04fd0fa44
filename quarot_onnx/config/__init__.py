"""Configuration of a quantization: plain, frozen, strict, and keyword-compatible with AMD Quark ONNX.

Names are imported when they are asked for: the command line needs choices long before it needs a configuration.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quarot_onnx.config.algorithm import (
        AlgoConfig,
        GPTAQConfig,
        GPTQConfig,
        HessianConfig,
        KVCacheConfig,
        QronosConfig,
        QuarotConfig,
        RoundingConfig,
        RTNConfig,
        SinkPrefixConfig,
        SmoothQuantConfig,
    )
    from quarot_onnx.config.choices import OutputFormat
    from quarot_onnx.config.config import QConfig
    from quarot_onnx.config.data_type import DataType, Int2, Int3, Int4, Int8, UInt4, UInt8
    from quarot_onnx.config.enums import CalibMethod, OpType, QuantGranularity, ScaleType
    from quarot_onnx.config.spec import (
        Int2Spec,
        Int3Spec,
        Int4Spec,
        Int5Spec,
        Int6Spec,
        Int7Spec,
        Int8Spec,
        Int16Spec,
        QLayerConfig,
        QTensorConfig,
        UInt2Spec,
        UInt3Spec,
        UInt4Spec,
        UInt5Spec,
        UInt6Spec,
        UInt7Spec,
        UInt8Spec,
        UInt16Spec,
        spec_class,
    )

__all__ = [
    "AlgoConfig",
    "CalibMethod",
    "DataType",
    "GPTAQConfig",
    "GPTQConfig",
    "HessianConfig",
    "Int2",
    "Int2Spec",
    "Int3",
    "Int3Spec",
    "Int4",
    "Int4Spec",
    "Int5Spec",
    "Int6Spec",
    "Int7Spec",
    "Int8",
    "Int8Spec",
    "Int16Spec",
    "KVCacheConfig",
    "OpType",
    "OutputFormat",
    "QConfig",
    "QLayerConfig",
    "QTensorConfig",
    "QronosConfig",
    "QuantGranularity",
    "QuarotConfig",
    "RTNConfig",
    "RoundingConfig",
    "ScaleType",
    "SinkPrefixConfig",
    "SmoothQuantConfig",
    "UInt2Spec",
    "UInt3Spec",
    "UInt4",
    "UInt4Spec",
    "UInt5Spec",
    "UInt6Spec",
    "UInt7Spec",
    "UInt8",
    "UInt8Spec",
    "UInt16Spec",
    "spec_class",
]

_MODULES = ("algorithm", "config", "spec", "data_type", "enums", "choices")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = getattr(import_module(f"{__name__}.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
