"""AMD Quark's import path of :mod:`quarot_onnx.config.data_type`."""

from quarot_onnx.config.data_type import *  # noqa: F403
