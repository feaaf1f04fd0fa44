"""The sink prefix (PrefixQuant, Chen et al. 2024, arXiv:2410.05265, section 4, without its training)."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from quarot_onnx.config.algo import AlgoConfig
from quarot_onnx.config.choices import PrefixForm
from quarot_onnx.config.saying import Said, Setting, SettingValueError


def _listed(value: object) -> object:
    """Ids as the command line has them, ``"1,260"``."""
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError("token ids are numbers with commas between them, as in 1,260")
    return [int(part) for part in parts]


_Ids = Annotated[tuple[Annotated[int, Field(ge=0, strict=True)], ...], Field(min_length=1), BeforeValidator(_listed)]


class SinkPrefixConfig(AlgoConfig):
    """Keep the tokens whose activations are outliers out of the integers: their keys and values come with the model.

    Attributes:
        form: Where they are kept. ``graph``: as constants that every attention reads; the caller feeds what comes after
            the prefix. ``npz``: in a file beside the model, as past inputs that the caller feeds. ``auto``: in the
            graph, where activations have a fixed scale and a prefix narrows their ranges; else not at all. ``none``:
            not at all.
        ids: The tokens; None finds them on the calibration data.
        max_tokens: How many are looked for at the most.
        name: ``"sink_prefix"``.
    """

    positional = ("form",)

    name: Literal["sink_prefix"] = "sink_prefix"
    form: Annotated[PrefixForm, BeforeValidator(PrefixForm.parse)] = PrefixForm.AUTO
    ids: _Ids | None = None
    max_tokens: Annotated[int, Field(ge=1, le=64, strict=True)] = 4

    @model_validator(mode="after")
    def _ids_are_used(self) -> Self:
        if self.form is PrefixForm.NONE and self.ids is not None:
            both = (Setting("prefix.form", str(self.form)), Setting("prefix.ids", self.ids))
            raise SettingValueError(Said("{} contradicts {}; leave out one of them", both))
        return self

    @property
    def needs_statistics(self) -> bool:
        """Yes, unless there is nothing to do."""
        return self.form is not PrefixForm.NONE


__all__ = ["SinkPrefixConfig"]
