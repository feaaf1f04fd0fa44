"""QuaRot rotations and quantization for ONNX language models, run on stock onnxruntime."""

from quarot_onnx.quantization.config import QConfig
from quarot_onnx.quantization.config.algorithm import QuarotConfig
from quarot_onnx.quantization.config.enums import CalibMethod, QuantGranularity, ScaleType
from quarot_onnx.quantization.config.spec import Int8Spec, QLayerConfig, UInt8Spec
from quarot_onnx.quantizer import ModelQuantizer

__all__ = [
    "CalibMethod",
    "Int8Spec",
    "ModelQuantizer",
    "QConfig",
    "QLayerConfig",
    "QuantGranularity",
    "QuarotConfig",
    "ScaleType",
    "UInt8Spec",
]
