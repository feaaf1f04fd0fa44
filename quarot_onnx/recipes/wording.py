"""How messages speak of a recipe's keys: as they stand in a file, in LLMC's words, or as options."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from quarot_onnx.config.misfits import Misfit
from quarot_onnx.config.saying import Said, SettingValueError
from quarot_onnx.config.strict import reason
from quarot_onnx.errors import ConfigError
from quarot_onnx.recipes.own import Recipe


class Wording:
    """The words of a file.

    Args:
        source: The file.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = source

    def knows(self, key: str) -> bool:  # noqa: ARG002 - for other forms of files
        """Whether the file can hold a key of `Recipe`."""
        return True

    def word(self, key: str) -> str:
        """A key of `Recipe`, such as ``weights.bits``, as the file spells it."""
        return key

    def named(self, key: str) -> str:
        """A key and where it stands."""
        return f"{self.source}: {self.word(key)}"

    def valued(self, key: str, value: object) -> str:
        """A key, where it stands, and its value."""
        return f"{self.named(key)}: {value!r}"

    def advised(self, key: str, value: object) -> str:
        """What to write for a key to have a value."""
        shown = str(value).lower() if isinstance(value, bool) else value
        return f"{self.word(key)}: {shown}"

    def brief(self, key: str, value: object) -> str:
        """A key and its value, the place of which was named before."""
        return f"{self.word(key)}: {value!r}"

    def sentence(self, said: Said) -> str:
        """A sentence about settings."""
        words, placed = list[str](), False
        for setting in said.settings:
            if setting.advised:
                words.append(self.advised(setting.key, setting.value))
            else:
                words.append((self.brief if placed else self.valued)(setting.key, setting.value))
                placed = True
        return said.put(words)

    def refused(self, misfit: Misfit) -> str:
        """What does not go together, and what to write."""
        return f"{self.named(misfit.key)}: {misfit.why}; {misfit.way_out(self.advised)}"


def parse(data: Mapping[str, object], wording: Wording, folder: Path | None) -> Recipe:
    """A recipe from plain data.

    Args:
        data: As a file of our own holds it.
        wording: Whose words errors use.
        folder: The folder against which relative paths are resolved.

    Raises:
        ConfigError: A key is unknown, or a value is not allowed.
    """
    try:
        return Recipe.model_validate(dict(data), context={"folder": folder})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, SettingValueError):
            raise ConfigError(wording.sentence(cause.said)) from None
        key = ".".join(str(part) for part in first["loc"])
        place = wording.named(key) if isinstance(first["input"], Mapping) else wording.valued(key, first["input"])
        raise ConfigError(f"{place}: {reason(first)}") from None
