"""The key/value cache in few bits (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4.3)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StrictBool, model_validator

from quarot_onnx.config.algo import AlgoConfig
from quarot_onnx.config.choices import CacheForm, CacheScales, Choice
from quarot_onnx.config.numbers import FLOAT_BITS, refuse_disguised
from quarot_onnx.config.paths import ConfigPath
from quarot_onnx.config.saying import Said, Setting, SettingValueError

WHOLE_TOKEN = -1
"""The group that holds all heads of a token, as the studies' code writes it."""

FEW_BITS = 4
"""Up to so many bits keys are worth balancing, and the largest values worth cutting off."""

UNBALANCED = "leave keys unbalanced (k_balance=False, on the command line --no-k-balance)"
"""What whoever cannot have balanced keys can do."""

_STORED_BITS = (8, 4)


def _bits(value: object) -> object:
    refuse_disguised(value)
    if value is None or value == FLOAT_BITS:
        return None
    if type(value) is not int or not 2 <= value <= 8:
        raise ValueError("keys and values have 2 to 8 bits, or 16, which leaves them in float")
    return value


def _group(value: object) -> object:
    refuse_disguised(value)
    if value is not None and value != WHOLE_TOKEN and (type(value) is not int or value < 2):
        raise ValueError(
            "a group has 2 or more entries of a head, or is -1, all heads of a token; without one it is a head"
        )
    return value


_Bits = Annotated[int | None, BeforeValidator(_bits)]
_Group = Annotated[int | None, BeforeValidator(_group)]
_Ratio = Annotated[float, Field(gt=0, le=1, strict=True)]


def _setting(name: str, value: object, *, advised: bool = False) -> Setting:
    return Setting(f"kv_cache.{name}", value, advised)


@dataclass(frozen=True)
class CacheGrid:
    """How keys, or values, are rounded.

    Attributes:
        bits: 2 to 8; None leaves them in float.
        group_size: Entries that share a scale; None for a head, WHOLE_TOKEN for all heads of a token.
        symmetric: Whether 0 lies in the middle.
        clip_ratio: What the range is multiplied by.
    """

    bits: int | None
    group_size: int | None
    symmetric: bool
    clip_ratio: float


class KVCacheConfig(AlgoConfig):
    """Keys and values of the past as integers; the keys rotated online (R3), where the rotation leaves that open.

    Attributes:
        k_bits: Of keys, 2 to 8; None, or 16, leaves them in float.
        v_bits: So for values.
        k_groupsize: Entries of a head that share a scale, a divisor of head_dim; None for the whole head, -1 for all
            heads of a token.
        v_groupsize: So for values.
        k_asym: The integers have a zero point of their own.
        v_asym: So for values.
        k_clip_ratio: What the range is multiplied by.
        v_clip_ratio: So for values.
        k_pre_rope: Keys are rounded before RoPE.
        k_balance: Keys and queries are balanced by calibration in place of R3. None: for integers of 4 bits, where R3
            would come in by itself.
        form: ``int``: the graph takes and gives integers, of 8 bits, or of 4, two in a byte. ``fake``: values on the
            grids, in float, for studies. ``auto``: ``int`` where both have 8 or 4 bits on symmetric grids, a scale for
            each head or fixed ones.
        scales: One for each ``token`` and head, found at run time and kept beside the integers; or fixed by
            calibration: one for each ``channel``, ``head``, or cache (``tensor``). ``auto``: ``token``; for
            8 bits in GroupQueryAttention, which takes fixed ones, ``head`` for keys that are not balanced and
            ``channel`` for others and values. Of 4 bits there, the graph keeps those of tokens.
        scale_file: Fixed scales in onnxruntime-genai's format in place of calibrated ones (`kvcache.scale_file`).
        name: ``"kv_cache"``.
    """

    positional = ("k_bits", "v_bits")
    synonyms = ("bits",)

    name: Literal["kv_cache"] = "kv_cache"
    k_bits: _Bits = None
    v_bits: _Bits = None
    k_groupsize: _Group = None
    v_groupsize: _Group = None
    k_asym: StrictBool = False
    v_asym: StrictBool = False
    k_clip_ratio: _Ratio = 1.0
    v_clip_ratio: _Ratio = 1.0
    k_pre_rope: StrictBool = False
    k_balance: StrictBool | None = None
    form: Annotated[CacheForm, BeforeValidator(CacheForm.parse)] = CacheForm.AUTO
    scales: Annotated[CacheScales, BeforeValidator(CacheScales.parse)] = CacheScales.AUTO
    scale_file: ConfigPath = None

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Take ``bits`` for both."""
        bits = data.pop("bits", None)
        if bits is None:
            return data
        try:
            _bits(bits)
        except ValueError as error:
            raise SettingValueError(Said(f"{{}}: {error}", (_setting("bits", bits),))) from error
        if twice := [name for name in ("k_bits", "v_bits") if name in data]:
            both = (_setting("bits", bits), _setting(twice[0], data[twice[0]]))
            verb = "say the same thing twice" if data[twice[0]] == bits else "contradict each other"
            raise SettingValueError(Said(f"{{}} and {{}} {verb}; leave out one of them", both))
        return data | {"k_bits": bits, "v_bits": bits}

    @model_validator(mode="after")
    def _holds(self) -> Self:
        if self.k_balance and self.k_pre_rope:
            text = "{}: keys are balanced behind RoPE, and {} rounds them before it; leave out one of the two"
            raise SettingValueError(Said(text, (self._set("k_balance"), self._set("k_pre_rope"))))
        reason = self.only_fake
        if self.form is CacheForm.INT and reason is not None:
            fake = _setting("form", str(CacheForm.FAKE), advised=True)
            text = f"{{}}: {reason.text}; use {{}}"
            raise SettingValueError(Said(text, (self._set("form"), *reason.settings, fake)))
        fixed = self._set("scales" if self.scale_file is None else "scale_file")
        if self.fixed and self.resolved_form is CacheForm.FAKE:
            why = reason or Said("{}", (self._set("form"),))
            text = f"{{}}: {why.text}, and fake scales are found for each token; leave it out"
            raise SettingValueError(Said(text, (fixed, *why.settings)))
        self._refuse_beside_a_file()
        return self

    def _refuse_beside_a_file(self) -> None:
        """Refuse what a file of scales says already."""
        if self.scale_file is None:
            return
        file = self._set("scale_file")
        if self.k_balance:
            text = "{}: the scales of {} are of other keys; leave out one of the two"
            raise SettingValueError(Said(text, (self._set("k_balance"), file)))
        if self.scales is not CacheScales.AUTO:
            text = "{}: {} says what has a scale; leave out one of them"
            raise SettingValueError(Said(text, (self._set("scales"), file)))
        for what, grid in (("k", self.grid(keys=True)), ("v", self.grid(keys=False))):
            if grid.bits is not None and grid.clip_ratio != 1:
                text = "{}: the scales of {} are taken as they are; leave it out"
                raise SettingValueError(Said(text, (self._set(f"{what}_clip_ratio"), file)))

    def _set(self, name: str) -> Setting:
        """A field in a sentence."""
        value = getattr(self, name)
        return _setting(name, str(value) if isinstance(value, Choice | Path) else value)

    @property
    def _idle(self) -> tuple[str, ...]:
        """Settings of what stays in float."""
        left = [what for what, bits in (("k_", self.k_bits), ("v_", self.v_bits)) if bits is None]
        names = [name for name in type(self).model_fields if name[:2] in left and not name.endswith("_bits")]
        names += [] if self.quantized else ["form", "scales", "scale_file"]
        return tuple(name for name in names if getattr(self, name) != type(self).model_fields[name].default)

    def grid(self, *, keys: bool) -> CacheGrid:
        """How keys, or values, are rounded."""
        if keys:
            return CacheGrid(self.k_bits, self.k_groupsize, not self.k_asym, self.k_clip_ratio)
        return CacheGrid(self.v_bits, self.v_groupsize, not self.v_asym, self.v_clip_ratio)

    @property
    def quantized(self) -> bool:
        """Whether anything is."""
        return self.k_bits is not None or self.v_bits is not None

    @property
    def fixed(self) -> bool:
        """Whether fixed scales were asked for."""
        return self.scale_file is not None or self.scales not in {CacheScales.AUTO, CacheScales.TOKEN}

    @property
    def rotates_keys(self) -> bool:
        """Whether R3 helps."""
        return self.k_bits is not None and not self.k_pre_rope

    @property
    def gains_from_balance(self) -> bool:
        """Whether balanced keys pay for their calibration."""
        few = self.k_bits is not None and self.k_bits <= FEW_BITS
        return few and self.rotates_keys and self.resolved_form is CacheForm.INT and self.scale_file is None

    @property
    def needs_statistics(self) -> bool:
        """Where keys are balanced."""
        return bool(self.k_balance) and self.quantized

    @property
    def without_data(self) -> str:
        """Keys can go unbalanced."""
        return UNBALANCED

    @property
    def only_fake(self) -> Said | None:
        """Why no integers can be kept; None where they can."""
        if self.k_bits is not None and self.k_pre_rope:
            text = "{}: keys before RoPE would have to be turned anew at every step"
            return Said(text, (self._set("k_pre_rope"),))
        for what, grid in (("k", self.grid(keys=True)), ("v", self.grid(keys=False))):
            if grid.bits is None:
                continue
            if grid.bits not in _STORED_BITS:
                return Said("{}: integers are kept with 8 or 4 bits", (self._set(f"{what}_bits"),))
            if not grid.symmetric:
                return Said("{}: integers are kept on symmetric grids", (self._set(f"{what}_asym"),))
            if grid.group_size is not None:
                text = "{}: integers are kept with a scale for each head, or fixed ones"
                return Said(text, (self._set(f"{what}_groupsize"),))
        return None

    @property
    def resolved_form(self) -> CacheForm:
        """INT or FAKE."""
        if self.form is not CacheForm.AUTO:
            return self.form
        return CacheForm.INT if self.only_fake is None else CacheForm.FAKE

    @property
    def said(self) -> tuple[Said, ...]:
        """What the user should know."""
        found = []
        if self._idle:
            left = "keys stay" if self.k_bits is None else "values stay"
            what = left if self.quantized else "the key/value cache stays"
            names = ", ".join("{}" for _ in self._idle)
            found.append(Said(f"of no effect, as {what} in float: {names}", tuple(map(self._set, self._idle))))
        if self.form is CacheForm.AUTO and self.quantized and (reason := self.only_fake) is not None:
            text = f"the key/value cache is rounded and stays in float, nothing gets smaller: {reason.text}"
            found.append(Said(text, reason.settings))
        return tuple(found)

    @property
    def notes(self) -> tuple[str, ...]:
        """The same in Python's words."""
        return tuple(map(str, self.said))


__all__ = ["FEW_BITS", "UNBALANCED", "WHOLE_TOKEN", "CacheGrid", "KVCacheConfig"]
