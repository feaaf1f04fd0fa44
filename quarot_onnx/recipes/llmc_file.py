"""The form of LLMC's configuration files (ModelTC/llmc, configs/quantization), strict.

Only what QuaRot, GPTQ and RTN take is known; all else is refused by name. `IGNORED` cannot matter here: the model is
the command's argument, evaluation is a command of its own, and the pipeline decides how much runs at a time.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool

from quarot_onnx.errors import did_you_mean
from quarot_onnx.quantization.config._files import FileConfig
from quarot_onnx.quantization.config._strict import Strict

TOP_KEYS = frozenset({"quant", "base", "calib", "save"})
"""The keys that tell LLMC's files from our own."""

IGNORED = (
    "model",
    "eval",
    "calib.download",
    "calib.bs",
    "calib.preproc",
    "calib.seed",
    "quant.weight.qmax_to_tensor",
    "quant.act.qmax_to_tensor",
    "quant.special.fp32_had",
)

_METHODS = ("Quarot", "GPTQ", "RTN")


def _method(value: object) -> object:
    found = next((name for name in _METHODS if name.casefold() == str(value).casefold()), None)
    if found is None:
        near = did_you_mean(str(value), _METHODS)
        raise ValueError(f"the method is not supported{near}; use {', '.join(_METHODS)}")
    return found


class _Quantized(Strict):
    """What weights and activations have in common."""

    quant_type: Literal["int-quant"] = "int-quant"
    bit: Annotated[int, Field(strict=True)]
    symmetric: StrictBool
    group_size: Annotated[int, Field(strict=True)] = -1
    qmax_to_tensor: bool = True


class LlmcWeight(_Quantized):
    """``quant.weight``."""

    granularity: Literal["per_channel", "per_group", "per_tensor"]
    calib_algo: Literal["minmax", "mse"] = "minmax"


class LlmcAct(_Quantized):
    """``quant.act``."""

    granularity: Literal["per_token", "per_group", "per_tensor"]
    calib_algo: Literal["minmax", "static_minmax"] = "minmax"
    static: StrictBool = False


class LlmcSpecial(Strict):
    """``quant.special``, of QuaRot and of GPTQ."""

    rotate_mode: Literal["hadamard"] | None = None
    fp32_had: bool = True
    online_rotate: StrictBool | None = None
    actorder: StrictBool = False
    static_groups: StrictBool = False
    percdamp: float | None = None
    blocksize: int | None = None
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
    special: LlmcSpecial = Field(default_factory=LlmcSpecial)
    quant_out: StrictBool | None = None

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
    download: bool = False
    path: str | None = None
    n_samples: int | None = None
    bs: int | None = None
    seq_len: int | None = None
    preproc: str | None = None
    seed: int | None = None


class LlmcBase(Strict):
    """``base``."""

    seed: int = 0


_BACKENDS = ("save_vllm", "save_sgl", "save_trtllm", "save_autoawq", "save_mlcllm", "save_lightllm", "save_quant")


class LlmcSave(Strict):
    """``save``; formats of other runtimes are taken only where they are off."""

    synonyms = _BACKENDS

    save_trans: StrictBool = False
    save_fake: StrictBool = False
    save_path: str | None = None

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Refuse the formats of other runtimes."""
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

    def ignored(self) -> list[str]:
        """The keys of this file that change nothing here."""
        found = []
        for path in IGNORED:
            *sections, key = path.split(".")
            section: Strict | None = self
            for name in sections:
                section = None if section is None else getattr(section, name)
            if section is not None and key in section.model_fields_set and getattr(section, key) is not None:
                found.append(path)
        return found
