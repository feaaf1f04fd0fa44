"""What is said of settings, so that it can be put into the words of whoever chose them: a file, options, Python.

`Misfit` is for one setting to blame; these sentences may name any number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quarot_onnx.config.misfits import python
from quarot_onnx.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """A setting in a sentence.

    Attributes:
        key: As a recipe names it: ``kv_cache.k_bits``.
        value: Its value.
        advised: Whether it is a way out, else it is as it was given.
    """

    key: str
    value: object
    advised: bool = False


@dataclass(frozen=True)
class Said:
    """A sentence.

    Attributes:
        text: With ``{}`` where a setting is named.
        settings: In that order.
    """

    text: str
    settings: tuple[Setting, ...] = ()

    def __str__(self) -> str:
        """In Python's words."""
        return self.put([python(setting.key, setting.value) for setting in self.settings])

    def put(self, words: Sequence[str]) -> str:
        """The sentence with words in place of its settings."""
        first, *others = self.text.split("{}")
        return first + "".join(word + rest for word, rest in zip(words, others, strict=True))


class SettingValueError(ValueError):
    """What a validator raises, with its sentence."""

    def __init__(self, said: Said) -> None:
        super().__init__(str(said))
        self.said = said


class SettingError(ConfigError):
    """What is wrong with a configuration, with its sentence."""

    def __init__(self, said: Said) -> None:
        super().__init__(str(said))
        self.said = said
