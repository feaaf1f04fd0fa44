"""The form of LLMC's configuration files (ModelTC/llmc, configs/quantization), strict.

Only what QuaRot, GPTQ and RTN take is known; all else is refused by name. `IGNORED` cannot matter here: the model is
the command's argument, evaluation is a command of its own, and the pipeline decides how much runs at a time.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool

from quarot_onnx.config.files import FileConfig
from quarot_onnx.config.strict import Strict
from quarot_onnx.errors import did_you_mean

TOP_KEYS = frozenset({"quant", "base", "calib", "save"})
"""The keys that tell LLMC's files from our own."""

IGNORED = (
    "model",
    "eval",
    "cvt",
    "calib.type",
    "calib.download",
    "calib.bs",
    "calib.preproc",
    "calib.padding",
    "calib.apply_chat_template",
    "calib.seed",
    "quant.weight.qmax_to_tensor",
    "quant.weight.use_qtorch",
    "quant.weight.need_pack",
    "quant.weight.pack_version",
    "quant.act.qmax_to_tensor",
    "quant.act.use_qtorch",
    "quant.kvcache.qmax_to_tensor",
    "quant.kvcache.use_qtorch",
    "quant.special.fp32_had",
    "quant.special.chunk_num",
    "quant.special.n_outs",
)
"""Keys of no effect here. How the model is packed, and in how many pieces a Hessian is summed, changes no result."""

_OF_QUAROT = ("base.seed", "quant.special.rotate_mode")
_OF_GPTQ = (
    "quant.special.actorder",
    "quant.special.static_groups",
    "quant.special.percdamp",
    "quant.special.blocksize",
    "quant.special.true_sequential",
    "quant.quant_out",
)
"""Keys of one method, of no effect beside others, as in LLMC."""

_NOT_DONE = {
    "vision": "vision towers are not quantized; put what is under quant.language in its place",
    "language": "put what is under quant.language directly under quant",
    "mix_bits": "all Linears have the same bits, but for lm_head and int8_down_proj; leave it out",
    "token_reduction": "no tokens are left out of a text; leave it out",
}
"""Sections of ``quant`` that ask for what is not implemented."""

_METHODS = ("Quarot", "GPTQ", "RTN")


def _method(value: object) -> object:
    found = next((name for name in _METHODS if name.casefold() == str(value).casefold()), None)
    if found is None:
        near = did_you_mean(str(value), _METHODS)
        raise ValueError(f"the method is not supported{near}; use {', '.join(_METHODS)}")
    return found


def _integers(value: object) -> object:
    if value != "int-quant":
        raise ValueError("only integers are supported, no floating-point grids; use int-quant, or leave it out")
    return value


_QuantType = Annotated[str, BeforeValidator(_integers)]
# LLMC computes with what YAML gives it, and stops at the text that YAML 1.1 makes of 1e-2.
_Whole = Annotated[int, Field(strict=True)]
_Number = Annotated[float, Field(strict=True)]


class _Quantized(Strict):
    """What weights and activations have in common."""

    quant_type: _QuantType = "int-quant"
    bit: _Whole
    symmetric: StrictBool
    group_size: _Whole = -1
    qmax_to_tensor: bool = True
    use_qtorch: bool = False


class LlmcWeight(_Quantized):
    """``quant.weight``."""

    need_pack: bool = False
    pack_version: str | None = None

    granularity: Literal["per_channel", "per_group", "per_tensor"]
    calib_algo: Literal["minmax", "mse"] = "minmax"


class LlmcAct(_Quantized):
    """``quant.act``."""

    granularity: Literal["per_token", "per_group", "per_tensor"]
    calib_algo: Literal["minmax", "static_minmax"] = "minmax"
    static: StrictBool = False


class LlmcCache(LlmcAct):
    """``quant.kvcache``: the settings of activations."""

    method: Literal["Naive"] = "Naive"


class LlmcSpecial(Strict):
    """``quant.special``, of QuaRot and of GPTQ."""

    quant_type: _QuantType = "int-quant"
    rotate_mode: Literal["hadamard"] | None = None
    fp32_had: bool = True
    online_rotate: StrictBool | None = None
    actorder: StrictBool = False
    static_groups: StrictBool = False
    percdamp: _Number | None = None
    blocksize: _Whole | None = None
    chunk_num: Annotated[int, Field(ge=1, strict=True)] | None = None
    n_outs: list[int] | None = None
    true_sequential: StrictBool = True
    owq: StrictBool = False

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Refuse what is not implemented."""
        if data.get("true_sequential") is False:
            raise ValueError(
                "true_sequential: false is not supported: Linears are always rounded in sequence; set true"
            )
        if data.get("owq"):
            raise ValueError("owq: true is not supported; set false, or leave it out")
        if data.get("rotate_mode") not in {None, "hadamard"}:
            raise ValueError(f"rotate_mode: {data['rotate_mode']} is not supported; use hadamard")
        return data


class LlmcQuant(Strict):
    """``quant``."""

    method: Annotated[str, BeforeValidator(_method)]
    weight: LlmcWeight
    act: LlmcAct | None = None
    kvcache: LlmcCache | None = None
    special: LlmcSpecial = Field(default_factory=LlmcSpecial)
    quant_out: StrictBool | None = None

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Refuse what is not implemented."""
        for name, why in _NOT_DONE.items():
            if data.get(name):
                raise ValueError(f"{name} is not supported: {why}")
            data.pop(name, None)
        return data

    @property
    def rotates(self) -> bool:
        """Whether this is QuaRot."""
        return self.method == "Quarot"

    @property
    def rounds(self) -> bool:
        """Whether this is GPTQ."""
        return self.method == "GPTQ"


class LlmcCalib(Strict):
    """``calib``."""

    name: str | None = None
    type: str | None = None
    download: bool = False
    path: str | None = None
    n_samples: _Whole | None = None
    bs: int | None = None
    seq_len: _Whole | None = None
    preproc: str | None = None
    padding: bool = False
    apply_chat_template: bool = False
    seed: int | None = None

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Refuse what is no plain text."""
        if data.get("type") not in {None, "txt"}:
            raise ValueError(f"type: {data['type']} is not supported: calibration is on plain text; use txt")
        if data.get("apply_chat_template"):
            raise ValueError(
                "apply_chat_template: true is not supported: texts are taken as they are; set false, and give a text "
                "that has the template applied"
            )
        return data


class LlmcBase(Strict):
    """``base``."""

    seed: _Whole = 0


_BACKENDS = (
    *("save_vllm", "save_sgl", "save_trtllm", "save_autoawq", "save_autogptq", "save_mlcllm", "save_lightllm"),
    *("save_lightx2v", "save_quant"),
)


class LlmcSave(Strict):
    """``save``; formats of other runtimes are taken only where they are off."""

    synonyms = _BACKENDS

    save_trans: StrictBool = False
    save_fake: StrictBool = False
    save_path: str | None = None

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Refuse the formats of other runtimes; `save_fp` is what `save_trans` was called once."""
        if "save_fp" in data:
            if "save_trans" in data:
                raise ValueError("save_fp and save_trans are one and the same; give save_trans alone")
            data["save_trans"] = data.pop("save_fp")
        for name in _BACKENDS:
            if data.pop(name, False):
                raise ValueError(f"{name}: true is not supported: the output is ONNX for onnxruntime; leave it out")
        return data


class LlmcFile(FileConfig):
    """A whole file."""

    base: LlmcBase = Field(default_factory=LlmcBase)
    model: dict[str, Any] | None = None
    calib: LlmcCalib | None = None
    eval: dict[str, Any] | None = None
    quant: LlmcQuant
    save: LlmcSave = Field(default_factory=LlmcSave)
    cvt: bool | None = None

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Refuse another method before anything that goes with it."""
        quant = data.get("quant")
        if isinstance(quant, Mapping) and "method" in quant:
            try:
                _method(quant["method"])
            except ValueError as error:
                raise ValueError(f"quant.method: {quant['method']}: {error}") from None
        return data

    def ignored(self) -> list[str]:
        """The keys of this file that change nothing here."""
        found = []
        others = (() if self.quant.rotates else _OF_QUAROT) + (() if self.quant.rounds else _OF_GPTQ)
        for path in IGNORED + others:
            *sections, key = path.split(".")
            section: Strict | None = self
            for name in sections:
                section = None if section is None else getattr(section, name)
            if section is not None and key in section.model_fields_set and getattr(section, key) is not None:
                found.append(path)
        if self.save.save_trans and not self.quant.rotates:
            found.append("save.save_trans")  # nothing is rotated that could be saved
        return found
