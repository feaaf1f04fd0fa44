"""QuaRot rotations and quantization for ONNX language models, run on stock onnxruntime.

The names below are imported when they are first used: a command that only reports an error need not wait for onnx.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quarot_onnx.config import QConfig
    from quarot_onnx.config.algorithm import GPTAQConfig, GPTQConfig, QronosConfig, QuarotConfig, RTNConfig
    from quarot_onnx.config.choices import OutputFormat
    from quarot_onnx.config.enums import CalibMethod, QuantGranularity, ScaleType
    from quarot_onnx.config.spec import (
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
    from quarot_onnx.evaluation.check import Check
    from quarot_onnx.evaluation.fidelity import Limits
    from quarot_onnx.quantizer import ModelQuantizer

_HOMES = {
    "CalibMethod": "quarot_onnx.config.enums",
    "Check": "quarot_onnx.evaluation.check",
    "GPTAQConfig": "quarot_onnx.config.algorithm",
    "GPTQConfig": "quarot_onnx.config.algorithm",
    "Int2Spec": "quarot_onnx.config.spec",
    "Int3Spec": "quarot_onnx.config.spec",
    "Int4Spec": "quarot_onnx.config.spec",
    "Int5Spec": "quarot_onnx.config.spec",
    "Int6Spec": "quarot_onnx.config.spec",
    "Int7Spec": "quarot_onnx.config.spec",
    "Int8Spec": "quarot_onnx.config.spec",
    "Limits": "quarot_onnx.evaluation.fidelity",
    "ModelQuantizer": "quarot_onnx.quantizer",
    "OutputFormat": "quarot_onnx.config.choices",
    "QConfig": "quarot_onnx.config",
    "QLayerConfig": "quarot_onnx.config.spec",
    "QronosConfig": "quarot_onnx.config.algorithm",
    "QuantGranularity": "quarot_onnx.config.enums",
    "QuarotConfig": "quarot_onnx.config.algorithm",
    "RTNConfig": "quarot_onnx.config.algorithm",
    "ScaleType": "quarot_onnx.config.enums",
    "UInt4Spec": "quarot_onnx.config.spec",
    "UInt8Spec": "quarot_onnx.config.spec",
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
