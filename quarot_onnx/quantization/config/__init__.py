"""Configuration of a quantization: plain, frozen, strict, and keyword-compatible with AMD Quark ONNX."""

from quarot_onnx.quantization.config.algorithm import AlgoConfig, QuarotConfig
from quarot_onnx.quantization.config.config import QConfig
from quarot_onnx.quantization.config.data_type import DataType, Int8, UInt8
from quarot_onnx.quantization.config.enums import CalibMethod, OpType, QuantGranularity, ScaleType
from quarot_onnx.quantization.config.spec import Int8Spec, QLayerConfig, QTensorConfig, UInt8Spec

__all__ = [
    "AlgoConfig",
    "CalibMethod",
    "DataType",
    "Int8",
    "Int8Spec",
    "OpType",
    "QConfig",
    "QLayerConfig",
    "QTensorConfig",
    "QuantGranularity",
    "QuarotConfig",
    "ScaleType",
    "UInt8",
    "UInt8Spec",
]
