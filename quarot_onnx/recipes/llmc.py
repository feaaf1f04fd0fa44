"""LLMC's two steps: QuaRot saves the rotated model, GPTQ rounds it.

======================================== =============================================================================
LLMC                                     here
======================================== =============================================================================
quant.method: Quarot                     rotation R1 + R2, with R4 where special.online_rotate; weights rounded to
                                         nearest. save.save_trans: true is for ``rotate`` alone
quant.method: GPTQ, RTN                  rounds a model as it is, rotated or not; special.online_rotate must be what
                                         the model's own record says of R4
special.rotate_mode: hadamard            randomised Hadamards with base.seed
weight.calib_algo: mse, minmax           clip search on, off
act.granularity: per_tensor with static  a scale per tensor from calibration
quant.kvcache, method Naive              keys and values of the past, fake where save.save_fake: true
quant_out: true                          inputs are measured behind quantized activations
save.save_fake: true                     format fake; else the format that holds the bits
======================================== =============================================================================

LLMC does R2 only together with R4, and a further Hadamard across heads before o_proj; here R2 is always done, since it
costs nothing at run time, and the Hadamard across heads is not.
"""

from pathlib import Path
from typing import Any

from quarot_onnx.config.choices import CacheForm
from quarot_onnx.errors import ConfigError
from quarot_onnx.recipes.llmc_file import LlmcAct, LlmcCache, LlmcFile, LlmcWeight
from quarot_onnx.recipes.wording import Wording

_WORDS = {
    "weights.method": "quant.method",
    "weights.bits": "quant.weight.bit",
    "weights.group_size": "quant.weight.group_size",
    "weights.symmetric": "quant.weight.symmetric",
    "weights.per_channel": "quant.weight.granularity",
    "weights.clip": "quant.weight.calib_algo",
    "weights.perc_damp": "quant.special.percdamp",
    "weights.act_order": "quant.special.actorder",
    "weights.static_groups": "quant.special.static_groups",
    "weights.block_size": "quant.special.blocksize",
    "weights.enable_aq_calibration": "quant.quant_out",
    "activations.bits": "quant.act.bit",
    "activations.group_size": "quant.act.group_size",
    "activations.symmetric": "quant.act.symmetric",
    "activations.granularity": "quant.act.granularity",
    "kv_cache.bits": "quant.kvcache.bit",
    "kv_cache.k_groupsize": "quant.kvcache.group_size",
    "kv_cache.v_groupsize": "quant.kvcache.group_size",
    "kv_cache.k_asym": "quant.kvcache.symmetric",
    "kv_cache.v_asym": "quant.kvcache.symmetric",
    "kv_cache.scales": "quant.kvcache.granularity",
    "kv_cache.form": "save.save_fake",
    "rotation.seed": "base.seed",
    "rotation.r4": "quant.special.online_rotate",
    "rotation.use_random_had": "quant.special.rotate_mode",
    "format": "save.save_fake",
    "calibration.text": "calib.path",
    "calibration.samples": "calib.n_samples",
    "calibration.seq_len": "calib.seq_len",
}


class LlmcWording(Wording):
    """LLMC's keys."""

    def knows(self, key: str) -> bool:
        """Whether LLMC has this key."""
        return key in _WORDS

    def word(self, key: str) -> str:
        """LLMC's name of a key of ours."""
        return _WORDS.get(key, key)

    def advised(self, key: str, value: object) -> str:
        """Methods are written large."""
        return super().advised(key, str(value).upper() if key == "weights.method" else _theirs(key, value))

    def valued(self, key: str, value: object) -> str:
        """The value as LLMC writes it."""
        return super().valued(key, _theirs(key, value))

    def brief(self, key: str, value: object) -> str:
        """The same."""
        return super().brief(key, _theirs(key, value))


def _theirs(key: str, value: object) -> object:
    """The value of a key of ours under LLMC's."""
    if key == "kv_cache.form":
        return value == CacheForm.FAKE
    return not value if key.endswith("_asym") else value


def as_own(file: LlmcFile, source: Path, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """A file of LLMC's as the plain data of one of ours.

    Args:
        file: What LLMC's file says.
        source: Its path, for errors.
        folder: The folder against which its paths are resolved.

    Returns:
        The data, and what the user should know about its calibration.

    Raises:
        ConfigError: It asks for what is not implemented.
    """
    quant, special = file.quant, file.quant.special
    data: dict[str, Any] = {"weights": _weights(quant.weight, source)}
    if quant.act is not None:
        data["activations"] = _activations(quant.act, source)
    if quant.kvcache is not None:
        data["kv_cache"] = _cache(quant.kvcache, source)
    if quant.rotates:
        data["rotation"] = {"use_random_had": True, "seed": file.base.seed, "r4": bool(special.online_rotate)}
    data["weights"]["method"] = "gptq" if quant.rounds else "rtn"
    if quant.rounds:
        _round(data, file, source)
    if file.save.save_fake:
        data["format"] = "fake"
        if "kv_cache" in data:
            data["kv_cache"] = {"form": "fake"} | data["kv_cache"]
    notes = _calibrate(data, file, folder)
    return data, notes


def _weights(weight: LlmcWeight, source: Path) -> dict[str, Any]:
    data: dict[str, Any] = {"bits": weight.bit, "symmetric": weight.symmetric, "clip": weight.calib_algo == "mse"}
    data |= _grouped(weight.granularity, weight.group_size, f"{source}: quant.weight")
    if weight.granularity == "per_tensor":
        data["per_channel"] = False
    return data


def _activations(act: LlmcAct, source: Path) -> dict[str, Any]:
    data: dict[str, Any] = {"bits": act.bit, "symmetric": act.symmetric}
    data |= _grouped(act.granularity, act.group_size, f"{source}: quant.act")
    if _is_static(act, f"{source}: quant.act"):
        data["granularity"] = "tensor"
    return data


def _cache(cache: LlmcCache, source: Path) -> dict[str, Any]:
    """Keys and values alike; ``per_token`` is a scale for each head of a token, as LLMC's rows are heads."""
    if _is_static(cache, f"{source}: quant.kvcache"):
        return {"bits": cache.bit, "k_asym": not cache.symmetric, "v_asym": not cache.symmetric, "scales": "tensor"}
    size = _grouped(cache.granularity, cache.group_size, f"{source}: quant.kvcache").get("group_size")
    grids = {f"{what}_asym": not cache.symmetric for what in "kv"} | {f"{what}_groupsize": size for what in "kv"}
    return {"bits": cache.bit, **grids}


def _is_static(act: LlmcAct, place: str) -> bool:
    """Whether there is one fixed scale."""
    if (act.granularity == "per_tensor") != act.static:
        raise ConfigError(
            f"{place}.granularity: {act.granularity} with static: {str(act.static).lower()} is not supported; use "
            "per_token, or per_tensor with static: true"
        )
    return act.static


def _grouped(granularity: str, size: int, place: str) -> dict[str, Any]:
    if (granularity == "per_group") != (size != -1):
        raise ConfigError(
            f"{place}.granularity: {granularity} contradicts group_size: {size}; per_group has a size, all others -1"
        )
    return {"group_size": size} if granularity == "per_group" else {}


def _round(data: dict[str, Any], file: LlmcFile, source: Path) -> None:
    """What GPTQ takes besides."""
    quant, special, weights = file.quant, file.quant.special, data["weights"]
    if quant.quant_out is False:
        raise ConfigError(
            f"{source}: quant.quant_out: false is not supported: inputs are measured behind the weights rounded so "
            "far; set it to true"
        )
    weights |= {"act_order": special.actorder, "static_groups": special.static_groups}
    given = {"perc_damp": special.percdamp, "block_size": special.blocksize}
    weights |= {key: value for key, value in given.items() if value is not None}
    if quant.quant_out and quant.act is not None:
        weights["enable_aq_calibration"] = True


def _calibrate(data: dict[str, Any], file: LlmcFile, folder: Path) -> list[str]:
    """The calibration section, and a note where its data set cannot be had."""
    calib = file.calib
    if calib is None:
        return []
    given = {"samples": calib.n_samples, "seq_len": calib.seq_len}
    section: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    data["calibration"] = section
    if calib.path is not None and (folder / calib.path).is_file():
        section["text"] = calib.path
        return []
    missing = f"calib.name: {calib.name}" if calib.path is None else f"calib.path: {calib.path}"
    return [f"{missing} is no text file: not read; name another with --calib-text"]
