"""QuaRot rotations and quantization for ONNX language models, run on stock onnxruntime.

The names below are imported when they are first used: a command that only reports an error need not wait for onnx.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quarot_onnx.quantization.config import QConfig
    from quarot_onnx.quantization.config.algorithm import QuarotConfig
    from quarot_onnx.quantization.config.enums import CalibMethod, QuantGranularity, ScaleType
    from quarot_onnx.quantization.config.spec import Int8Spec, QLayerConfig, UInt8Spec
    from quarot_onnx.quantizer import ModelQuantizer

_HOMES = {
    "CalibMethod": "quarot_onnx.quantization.config.enums",
    "Int8Spec": "quarot_onnx.quantization.config.spec",
    "ModelQuantizer": "quarot_onnx.quantizer",
    "QConfig": "quarot_onnx.quantization.config",
    "QLayerConfig": "quarot_onnx.quantization.config.spec",
    "QuantGranularity": "quarot_onnx.quantization.config.enums",
    "QuarotConfig": "quarot_onnx.quantization.config.algorithm",
    "ScaleType": "quarot_onnx.quantization.config.enums",
    "UInt8Spec": "quarot_onnx.quantization.config.spec",
}

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


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
