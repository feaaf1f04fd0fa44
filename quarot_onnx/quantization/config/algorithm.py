"""AMD Quark's import path of :mod:`quarot_onnx.config.algorithm`."""

from quarot_onnx.config.algorithm import *  # noqa: F403
