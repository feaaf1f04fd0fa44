"""AMD Quark's import path of :mod:`quarot_onnx.config.config`."""

from quarot_onnx.config.config import *  # noqa: F403
