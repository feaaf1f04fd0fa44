"""AMD Quark's import path of :mod:`quarot_onnx.config`."""

from quarot_onnx.config import *  # noqa: F403
