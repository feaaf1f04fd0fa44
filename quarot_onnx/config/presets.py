"""AMD Quark's presets by name: refused, with what to write in their place."""

from typing import Self

from quarot_onnx.config.files import FileConfig
from quarot_onnx.errors import ConfigError


class WithoutPresets(FileConfig):
    """A configuration that is spelt out."""

    @classmethod
    def get_default_config(cls, name: str) -> Self:
        """Refuse a preset: what it stands for differs from one release of Quark to the next.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"get_default_config({name!r}) is not supported: presets are Quark's own; spell it out, such as "
            "QConfig(QLayerConfig(activation=UInt8Spec(), weight=Int8Spec()))"
        )
