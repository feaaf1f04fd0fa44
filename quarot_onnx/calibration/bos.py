"""The token that a model wants in front of every window (BOS), and why.

Of the files beside the tokenizer the first that tells decides, a null included: models without BOS say
``"bos_token": null`` in tokenizer_config.json, while config.json of the same model may name the separator of documents.

1. tokenizer_config.json: ``add_bos_token`` false says none; otherwise ``bos_token``.
2. special_tokens_map.json: ``bos_token``.
3. config.json, then genai_config.json (in its section ``model``): ``bos_token_id``.
4. The post-processor of tokenizer.json: what it puts in front of a text.
"""

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer  # type: ignore[import-untyped]

from quarot_onnx.calibration.tokenizer import load_tokenizer, token_id, token_text, tokenizer_file
from quarot_onnx.errors import CalibrationError
from quarot_onnx.io.companions import GENAI_CONFIG, read_json, section

_WAYS = "give its id (--bos-id N; in Python bos=N), or go without (--no-bos; Bos.NONE)"
_PROBES = ("a", "1")
"""Texts of which nearly every tokenizer makes a token: what stands before that is put there by the post-processor."""
_WORDS = 64
"""How many of its own words are tried with one that makes none of these."""


class Bos(enum.Enum):
    """Where the BOS id comes from, if it is not given."""

    AUTO = "as the tokenizer's files say"
    FORCED = "the one that the files name, whether or not they ask for it"
    NONE = "none"

    @classmethod
    def of(cls, value: bool | int | None) -> "Bos | int":
        """What a recipe's ``bos`` means: true and false force, an integer is the id, null leaves it to the files."""
        if value is None:
            return cls.AUTO
        if isinstance(value, bool):
            return cls.FORCED if value else cls.NONE
        return value


@dataclass(frozen=True)
class BosChoice:
    """A BOS and why it is used.

    Attributes:
        id: The token id in front of every window, None for none.
        why: Who says so.
    """

    id: int | None
    why: str

    def __str__(self) -> str:
        what = "none" if self.id is None else f"id {self.id} in front of every window"
        return f"{what} ({self.why})"


def choose_bos(path: str | Path, bos: int | Bos | None = Bos.AUTO) -> BosChoice:
    """The BOS to use.

    Args:
        path: A tokenizer.json, or the folder that holds one.
        bos: An id, or where it comes from; None for none, as ``Bos.NONE``.

    Raises:
        CalibrationError: A file that is not readable, a BOS that the tokenizer does not know, or one that is forced
            and that no file names.
    """
    if isinstance(bos, bool):  # True is no id
        bos = Bos.of(bos)
    if bos is None or bos is Bos.NONE:
        return BosChoice(None, "asked for")
    if not isinstance(bos, Bos):
        if not isinstance(bos, Integral) or not 0 <= int(bos) < 1 << 31:
            raise CalibrationError(f"the BOS {bos!r} is no token id: {_WAYS}")
        return BosChoice(int(bos), "asked for")
    path = tokenizer_file(path)
    tokenizer = load_tokenizer(path)
    if bos is Bos.FORCED:
        found = next((choice for choice in _told(path, tokenizer) if choice.id is not None), None)
        if found is None:
            raise CalibrationError(f"no file beside {path} names a BOS, which was asked for: {_WAYS}")
        return BosChoice(found.id, f"asked for, {found.why}")
    if _settings(path).get("add_bos_token") is False:
        return BosChoice(None, "tokenizer_config.json: add_bos_token is false")
    return next(_told(path, tokenizer), BosChoice(None, "no file names one"))


def find_bos(path: str | Path) -> int | None:
    """The BOS id that the files beside a tokenizer ask for, None for none.

    Raises:
        CalibrationError: As ``choose_bos``.
    """
    return choose_bos(path).id


def resolve_bos(path: str | Path, bos: int | Bos | None) -> int | None:
    """The BOS id to use: as given, none, or what the files say.

    Raises:
        CalibrationError: As ``choose_bos``.
    """
    return choose_bos(path, bos).id


def _settings(path: Path) -> dict[str, Any]:
    return read_json(path.parent / "tokenizer_config.json", CalibrationError)


def _told(path: Path, tokenizer: Tokenizer) -> Iterator[BosChoice]:
    """What each file says, of those that say anything, the most telling first."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = read_json(path.parent / name, CalibrationError)
        if "bos_token" in content:
            yield _named(content["bos_token"], path.parent / name, path, tokenizer)
    configs: dict[str, Mapping[str, Any]] = {
        "config.json": read_json(path.parent / "config.json", CalibrationError),
        GENAI_CONFIG: section(read_json(path.parent / GENAI_CONFIG, CalibrationError), "model"),
    }
    for name, config in configs.items():
        if "bos_token_id" in config:
            yield _numbered(config["bos_token_id"], path.parent / name)
    front = _put_in_front(tokenizer)
    if front is not None:
        yield BosChoice(front, f"the post-processor of {path.name}")


def _named(said: object, file: Path, path: Path, tokenizer: Tokenizer) -> BosChoice:
    """A BOS that is named by its text."""
    token = token_text(said)
    if token is None:
        return BosChoice(None, f"{file.name}: bos_token is null")
    known = token_id(token, tokenizer)
    if known is None:
        raise CalibrationError(f"{file} names the BOS {token!r}, which {path} does not know: {_WAYS}")
    return BosChoice(known, f"{file.name}: bos_token {token!r}")


def _numbered(said: object, file: Path) -> BosChoice:
    """A BOS that is named by its id."""
    if said is None:
        return BosChoice(None, f"{file.name}: bos_token_id is null")
    if type(said) is not int or said < 0:
        raise CalibrationError(f"{file}: bos_token_id {said!r} is no token id: {_WAYS}")
    return BosChoice(said, f"{file.name}: bos_token_id {said}")


def _put_in_front(tokenizer: Tokenizer) -> int | None:
    """The first token that the post-processor puts before a text; what it puts behind one is no BOS."""
    for probe in chain(_PROBES, _words(tokenizer)):
        encoded = tokenizer.encode(probe, add_special_tokens=True)
        added = list(encoded.special_tokens_mask)
        if 0 in added:
            return int(encoded.ids[0]) if added[0] else None
    return None


def _words(tokenizer: Tokenizer) -> Iterator[str]:
    yield from sorted(tokenizer.get_vocab())[:_WORDS]
