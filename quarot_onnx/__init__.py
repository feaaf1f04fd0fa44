"""QuaRot rotations and quantization for ONNX language models, run on stock onnxruntime.

The names below are imported when they are first used: a command that only reports an error need not wait for onnx.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quarot_onnx.choices import OutputFormat
    from quarot_onnx.evaluation.check import Check
    from quarot_onnx.evaluation.fidelity import Limits
    from quarot_onnx.quantization.config import QConfig
    from quarot_onnx.quantization.config.algorithm import GPTAQConfig, GPTQConfig, QronosConfig, QuarotConfig, RTNConfig
    from quarot_onnx.quantization.config.enums import CalibMethod, QuantGranularity, ScaleType
    from quarot_onnx.quantization.config.spec import (
        Int2Spec,
        Int3Spec,
        Int4Spec,
        Int5Spec,
        Int6Spec,
        Int7Spec,
        Int8Spec,
        QLayerConfig,
        UInt4Spec,
        UInt8Spec,
    )
    from quarot_onnx.quantizer import ModelQuantizer

_HOMES = {
    "CalibMethod": "quarot_onnx.quantization.config.enums",
    "Check": "quarot_onnx.evaluation.check",
    "GPTAQConfig": "quarot_onnx.quantization.config.algorithm",
    "GPTQConfig": "quarot_onnx.quantization.config.algorithm",
    "Int2Spec": "quarot_onnx.quantization.config.spec",
    "Int3Spec": "quarot_onnx.quantization.config.spec",
    "Int4Spec": "quarot_onnx.quantization.config.spec",
    "Int5Spec": "quarot_onnx.quantization.config.spec",
    "Int6Spec": "quarot_onnx.quantization.config.spec",
    "Int7Spec": "quarot_onnx.quantization.config.spec",
    "Int8Spec": "quarot_onnx.quantization.config.spec",
    "Limits": "quarot_onnx.evaluation.fidelity",
    "ModelQuantizer": "quarot_onnx.quantizer",
    "OutputFormat": "quarot_onnx.choices",
    "QConfig": "quarot_onnx.quantization.config",
    "QLayerConfig": "quarot_onnx.quantization.config.spec",
    "QronosConfig": "quarot_onnx.quantization.config.algorithm",
    "QuantGranularity": "quarot_onnx.quantization.config.enums",
    "QuarotConfig": "quarot_onnx.quantization.config.algorithm",
    "RTNConfig": "quarot_onnx.quantization.config.algorithm",
    "ScaleType": "quarot_onnx.quantization.config.enums",
    "UInt4Spec": "quarot_onnx.quantization.config.spec",
    "UInt8Spec": "quarot_onnx.quantization.config.spec",
}

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
    "UInt4Spec",
    "UInt8Spec",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
