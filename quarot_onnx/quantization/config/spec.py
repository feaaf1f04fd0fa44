"""AMD Quark's import path of :mod:`quarot_onnx.config.spec`."""

from quarot_onnx.config.spec import *  # noqa: F403
