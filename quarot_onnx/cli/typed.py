"""What was typed, as keys of a recipe: ``--w-bits 4`` is ``weights.bits``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from typer.models import OptionInfo

from quarot_onnx.cli.options import Key
from quarot_onnx.cli.quantize_options import QuantizeOptions
from quarot_onnx.cli.rotate_options import RotateOptions
from quarot_onnx.config.algorithm import QuarotConfig
from quarot_onnx.config.choices import Choice, Scheme
from quarot_onnx.errors import ConfigError
from quarot_onnx.recipes.loading import Loaded
from quarot_onnx.recipes.wording import Wording

_METHODS = {
    "w_rtn": ("rtn", ("rtn",)),
    "use_v2": ("gptaq", ("gptq", "gptaq")),
    "asym_calibrate": ("gptaq", ("gptq", "gptaq")),
}
"""Other ways to name a rounding, and the names that may stand beside them: GPTAQ is GPTQ in its second version."""

_AQ = {True: "enable_aq_calibration", False: "no_enable_aq_calibration"}

_SHARED = {"kv_cache.k_bits": "kv_cache.bits", "kv_cache.v_bits": "kv_cache.bits"}
"""Keys that another one may set."""

ROTATION_SWITCHES = frozenset({"rotation.r1", "rotation.r2", "rotation.r3", "rotation.r4"})
_OVERRIDING = frozenset(
    {"calibration.text", "calibration.text_key", "calibration.tokenizer", "calibration.bos", "rotation.seed"}
)
"""What may be typed although a file says it too: what differs between one run and the next."""


_SCHEMES = {
    ("weights.bits", 8): (Scheme.W8A8_DYNAMIC, Scheme.W8A8_DYNAMIC),
    ("activations.bits", 8): (Scheme.W4A8, Scheme.W8A8_DYNAMIC),
    ("activations.bits", 16): (Scheme.W4A16, Scheme.W8),
    ("activations.granularity", "tensor"): (Scheme.W8A8_STATIC, Scheme.W8A8_STATIC),
}
"""What to take instead of a scheme of low bits, and of one of plain 8 bits, for a key to have a value."""


@dataclass(frozen=True)
class Declared:
    """An option that sets a key of a recipe.

    Attributes:
        name: Its field.
        key: The key.
        yes: What is typed, before the value where it takes one.
        no: What is typed for the opposite of a switch; empty for an option with a value, and for a switch without.
        switch: Whether it takes no value.
    """

    name: str
    key: str
    yes: str
    no: str
    switch: bool

    def words(self, value: object) -> str:
        """What was typed for a value."""
        if self.switch:
            return self.yes if value else self.no
        return f"{self.yes} {value.lower() if isinstance(value, Choice) else value}"


def declared(options: type) -> tuple[Declared, ...]:
    """The options of a dataclass that set keys, by the `Key` that stands in their annotations."""
    found = []
    for name, hint in get_type_hints(options, include_extras=True).items():
        keys = [item.name for item in getattr(hint, "__metadata__", ()) if isinstance(item, Key)]
        if not keys:
            continue
        option = next(item for item in hint.__metadata__ if isinstance(item, OptionInfo))
        # Before typer has looked at it, the first name stands where a default would.
        spelt = [item for item in (option.default, *(option.param_decls or ())) if isinstance(item, str)]
        yes, _, no = (*spelt, _flag(name))[0].partition("/")
        switch = hint.__origin__ in {bool, bool | None}
        found.append(Declared(name, keys[0], yes, no, switch))
    return tuple(found)


@dataclass(frozen=True)
class Typed:
    """A key that was typed.

    Attributes:
        value: Its value.
        words: What was typed.
    """

    value: Any
    words: str

    @property
    def flag(self) -> str:
        """The option without its value."""
        return self.words.split()[0]


def typed_keys(options: object) -> dict[str, Typed]:
    """The keys that options set.

    Args:
        options: ``QuantizeOptions`` or ``RotateOptions``.

    Raises:
        ConfigError: The rounding, where inputs are measured, the samples or the BOS are said twice and differently.
    """
    found: dict[str, Typed] = {}
    for option in declared(type(options)):
        value = getattr(options, option.name)
        if value is None or (value is False and not option.no):
            continue
        words = option.words(value)
        before = found.get(option.key)
        if before is not None and (type(before.value), before.value) != (type(value), value):
            raise ConfigError(f"{words} contradicts {before.words}; leave out one of them")
        found[option.key] = Typed(value, words)
    _method(options, found)
    _aq_calibration(options, found)
    if exclude := getattr(options, "exclude", None):
        found["exclude"] = Typed(list(exclude), f"--exclude {exclude[0]}")
    return found


def rotation_options(typed: Mapping[str, Typed]) -> QuarotConfig:
    """The rotation options as a configuration."""
    given = {key: item.value for key, item in typed.items() if key.startswith("rotation.")}
    return QuarotConfig(**{key.removeprefix("rotation."): value for key, value in given.items()})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _method(options: object, found: dict[str, Typed]) -> None:
    """Take in the other ways to name a rounding."""
    for name, (method, includes) in _METHODS.items():
        if not getattr(options, name, None):
            continue
        before = found.get("weights.method")
        if before is not None and before.value not in includes:
            raise ConfigError(f"{_flag(name)} is {method} and contradicts {before.words}; leave out one of them")
        words = _flag(name) if before is None else f"{before.words} {_flag(name)}"
        found["weights.method"] = Typed(method, words)


def _aq_calibration(options: object, found: dict[str, Typed]) -> None:
    """Take in where inputs are measured, for which there is an option for each way."""
    given = [value for value, name in _AQ.items() if getattr(options, name, None)]
    if len(given) > 1:
        raise ConfigError(f"{_flag(_AQ[True])} contradicts {_flag(_AQ[False])}; leave out one of them")
    for value in given:
        found["weights.enable_aq_calibration"] = Typed(value, _flag(_AQ[value]))


def _flags() -> dict[str, Declared]:
    """The option of every key; of two names the first."""
    options = (*declared(RotateOptions), *declared(QuantizeOptions))
    return {option.key: option for option in reversed(options)}


class OptionWording(Wording):
    """Options that were typed are named as typed; the rest as in the file beside them, or as options."""

    def __init__(
        self,
        typed: Mapping[str, Typed],
        loaded: Loaded | None,
        scheme: Scheme | None = None,
        *,
        plain: bool = False,
    ) -> None:
        """Speak of ``typed``; of ``loaded`` where there is a file; of ``scheme`` where options change one.

        Args:
            typed: What was typed.
            loaded: The file.
            scheme: The scheme.
            plain: Whether it writes plain 8 bits.
        """
        super().__init__("command line" if loaded is None else loaded.source)
        self._typed, self._loaded = typed, loaded
        self._file = None if loaded is None else loaded.wording
        self._scheme = scheme
        self._plain = plain

    def named(self, key: str) -> str:
        """The words that were typed, or the key in its file."""
        key = self._given(key)
        if key in self._typed:
            return self._typed[key].words
        file = self._holder(key)
        if file is not None:
            return file.named(key)
        return self.word(key) if self._scheme is None else f"the scheme {self._scheme}"

    def valued(self, key: str, value: object) -> str:
        """The same; words that were typed hold the value."""
        key = self._given(key)
        if key in self._typed:
            return self._typed[key].words
        file = self._holder(key)
        return super().valued(key, value) if file is None else file.valued(key, value)

    def brief(self, key: str, value: object) -> str:
        """The same without the name of the file."""
        key = self._given(key)
        file = self._holder(key)
        return self.valued(key, value) if key in self._typed or file is None else file.brief(key, value)

    def word(self, key: str) -> str:
        """The key in its file, or its option."""
        file = self._holder(key)
        if file is not None:
            return file.word(key)
        return _flags()[key].yes if key in _flags() else key

    def advised(self, key: str, value: object) -> str:
        """A line of the file, or an option with its value."""
        key = self._given(key)
        file = self._holder(key)
        if file is not None:
            return file.advised(key, value)
        if self._scheme is not None and (key, value) in _SCHEMES:
            return f"--scheme {_SCHEMES[key, value][self._plain]}"
        if key not in _flags():
            return f"{key}: {value} in a recipe"
        return _flags()[key].words(value)

    def _given(self, key: str) -> str:
        """The key that set what another one names: ``kv_cache.bits`` sets the bits of keys and of values."""
        shared = _SHARED.get(key, key)
        section, _, name = shared.partition(".")
        in_file = self._loaded is not None and name in (self._loaded.data.get(section) or {})
        return key if key in self._typed or not (shared in self._typed or in_file) else shared

    def _holder(self, key: str) -> Wording | None:
        """The file, where there is one that can hold the key."""
        return self._file if self._file is not None and self._file.knows(key) else None


def merged(typed: Mapping[str, Typed], given: Mapping[str, Any], *, rotates: bool) -> dict[str, Any]:
    """A recipe's data with what was typed over it.

    Args:
        typed: From `typed_keys`.
        given: The data of a recipe.
        rotates: Whether to rotate though nothing says so.
    """
    data: dict[str, Any] = {key: _copy(value) for key, value in given.items()}
    if rotates:
        data["rotation"] = {}
    for key, item in typed.items():
        *sections, last = key.split(".")
        if key == "rotation.seed" and data.get("rotation") is None:
            continue  # a seed alone asks for no rotation
        section = data
        for name in sections:
            if section.get(name) is None:
                section[name] = {}
            section = section[name]
        # A path that was typed is meant from here, not from the folder of the file.
        section[last] = item.value.absolute() if isinstance(item.value, Path) else item.value
    return data


def refuse_twice(typed: Mapping[str, Typed], loaded: Loaded) -> None:
    """Refuse options that speak of what a recipe file speaks of.

    Raises:
        ConfigError: Both speak of the same key.
    """
    for key, item in typed.items():
        *sections, last = key.split(".")
        section: Any = loaded.data
        for name in sections:
            section = section.get(name) or {}
        if last in section and key not in _OVERRIDING:
            raise ConfigError(
                f"{item.words} and --recipe say the same thing twice: {loaded.wording.named(key)}; leave out the "
                "option, or change the file"
            )


def _copy(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value
