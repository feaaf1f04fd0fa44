"""`Strict`: frozen pydantic models that take nothing they do not know and raise only `ConfigError`.

Every configuration of this package derives from it. A subclass declares fields and may add

* ``positional``: the fields that positional arguments fill, in order (default: keywords only);
* ``synonyms``: keys beside the fields that `normalised` understands, so that a misspelling of one finds it;
* ``unlisted``: fields that are left out where the known keys are listed;
* ``normalised``: rewrites the raw mapping (synonyms, old spellings) before the fields are validated.

Validators, of fields and of models, raise `ValueError` with what is allowed; the place is put in front here. A model
nested in another is built by ``model_validate``, so that the place of an inner fault is its full key path::

    QConfig.algo_config[0].r_matrix_dim=0: Input should be greater than or equal to 1
    q.yaml: QConfig.global_config.weight: unknown key 'symetric' (did you mean 'symmetric'?); known keys: ...

``X.from_dict(data, source="rotation_config.json")`` is the way from a parsed file to a model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from quarot_onnx.config.numbers import as_number
from quarot_onnx.errors import ConfigError, did_you_mean

_LONGEST_VALUE = 80
_PLAINLY = {
    "dict_type": "a mapping of keys to values is needed",
    "list_type": "a list is needed; put it into [...]",
    "path_type": "a path is needed",
    "string_too_short": "the text is empty",
    "too_short": "the list is empty; name one or more",
    "tuple_type": "a list is needed; put it into [...]",
}
"""Where pydantic speaks of Python's types, or of itself."""


class Strict(BaseModel):
    """A frozen model with no unknown keys, whose only exception is `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    positional: ClassVar[tuple[str, ...]] = ()
    synonyms: ClassVar[tuple[str, ...]] = ()
    unlisted: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = self._bound(args, kwargs)
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise ConfigError(_describe(type(self).__name__, error)) from None

    # Tells pydantic that nested mappings need not pass through this constructor: it would end the search
    # for faults at the inner model and lose the outer part of the key path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: object) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError:
            raise self._frozen(name) from None

    def __delattr__(self, name: str) -> None:
        try:
            super().__delattr__(name)
        except ValidationError:
            raise self._frozen(name) from None

    def _frozen(self, name: str) -> ConfigError:
        made = type(self).__name__
        return ConfigError(f"{made}.{name}: configurations are frozen; make a new one, {made}(...)")

    def __hash__(self) -> int:
        """By value, also where a part of it hashes by identity."""
        return hash(repr(self))

    @classmethod
    def positional_names(cls, count: int) -> tuple[str, ...]:  # noqa: ARG003 - for subclasses
        """The fields that ``count`` positional arguments may fill, in order."""
        return cls.positional

    @classmethod
    def _bound(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = cls.positional_names(len(args))
        if len(args) > len(names):
            raise ConfigError(f"{cls.__name__}: {len(args)} positional arguments, at most {len(names)} are taken")
        given = dict(zip(names, args, strict=False))
        if twice := given.keys() & kwargs.keys():
            raise ConfigError(f"{cls.__name__}: {', '.join(sorted(twice))} given by position and by keyword")
        return given | kwargs

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Rewrite the raw mapping before its fields are validated; raises ValueError to refuse it."""
        return data

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        taken = cls.normalised(dict(data))
        for key in taken:
            if key not in cls.model_fields:
                near = did_you_mean(str(key), (*cls.model_fields, *cls.synonyms))
                known = ", ".join(name for name in cls.model_fields if name not in cls.unlisted)
                raise ValueError(f"unknown key {key!r}{near}; known keys: {known}")
        return taken

    @classmethod
    def from_dict(cls, data: object, *, source: str | Path | None = None, folder: Path | None = None) -> Self:
        """Build the model from plain data.

        Args:
            data: A mapping of plain values, as `to_dict` returns or a JSON or YAML file holds.
            source: The file that errors name.
            folder: The folder against which relative paths in the data are resolved; None leaves them.

        Raises:
            ConfigError: A key is unknown or missing, or a value is not allowed; names source and key path.
        """
        place = f"{source}: {cls.__name__}" if source else cls.__name__
        if not isinstance(data, Mapping):
            raise ConfigError(f"{source or cls.__name__}: a mapping is needed, not {_shown(data)}")
        try:
            return cls.model_validate(dict(data), context={"folder": folder})
        except ValidationError as error:
            raise ConfigError(_describe(place, error)) from None

    def to_dict(self, *, folder: Path | None = None) -> dict[str, Any]:
        """Plain data (dicts, lists, strings, numbers) from which `from_dict` builds an equal model.

        Args:
            folder: The folder of the file that the data will be written to. Relative paths become absolute,
                and paths inside the folder relative to it, so that they name the same file when read back.
        """
        return self.model_dump(mode="json", context={"folder": folder})


def _describe(place: str, error: ValidationError) -> str:
    """One line about the first fault: where, which value, what is allowed."""
    first = error.errors(include_url=False)[0]
    return f"{place}{_path(first)}: {reason(first)}"


def _path(detail: ErrorDetails) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"])
    if not path or detail["type"] == "missing" or isinstance(detail["input"], Mapping | BaseModel):
        return path
    return f"{path}={_shown(detail['input'])}"


def reason(detail: ErrorDetails) -> str:
    """What is wrong with a value, and what is allowed."""
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if detail["type"] in {"float_type", "int_type"}:
        return as_number(detail["input"], whole=detail["type"] == "int_type") or detail["msg"]
    if detail["type"] == "model_type":
        if detail["input"] is None:
            return "the section is empty; give its keys, or leave it out where it is not needed"
        return f"a mapping of keys to values is needed (in Python also {detail['ctx']['class_name']}(...))"
    return _PLAINLY.get(detail["type"], detail["msg"])


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"
