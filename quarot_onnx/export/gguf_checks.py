"""What a GGUF file shows that is not its weights: whether a model can be made of it, and which one.

The settings of a file, and the names and shapes of its tensors, are compared with the model that transformers makes of
them, without weights: those of a large file take minutes to dequantize.
"""

# ruff: noqa: PLC0415

import copy
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from quarot_onnx.export.loading import RefusalError, be, faults, some

ROPE_FACTORS = "rope_freqs.weight"
"""What llama.cpp divides the rotary frequencies by: how Llama 3.1's scaling is kept in a GGUF file."""

_SIZES = ("block_count", "embedding_length", "attention.head_count")
"""Without them transformers would take the sizes of a model of its own."""

_WINDOW = "attention.sliding_window"

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    _WINDOW: (0,),
    "attention.causal": (True,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "expert_count": (0,),
}
"""Settings that change what a model computes, with the values that do not."""

_ELSEWHERE = "export the Hugging Face folder that the file was made from"
_ANOTHER = f"the export would be another model; {_ELSEWHERE}"


def check_file(path: Path, fields: Mapping[str, object]) -> None:
    """Refuse a part of a model, and an architecture that transformers does not read from GGUF files.

    Raises:
        RefusalError: It is one.
    """
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    parts = fields.get("split.count", 1)
    if parts not in (0, 1):
        raise RefusalError(
            f"{path} is one of {parts} parts of a model, which transformers does not put together; join them with "
            "llama.cpp (llama-gguf-split --merge FIRST_PART OUT.gguf)"
        )
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    known = sorted({*GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer"})
    architecture = str(fields.get("general.architecture", "none"))
    if _config_name(architecture) not in known:
        raise RefusalError(
            f"{path} is of architecture {architecture!r}, which transformers cannot read from a GGUF file; it reads "
            f"{', '.join(known)}; {_ELSEWHERE}"
        )
    read = GGUF_CONFIG_MAPPING.get(_config_name(architecture), {})
    lacking = [f"{architecture}.{key}" for key in _SIZES if key in read and f"{architecture}.{key}" not in fields]
    if lacking:
        raise RefusalError(
            f"{path} does not say how large the model is: it lacks {', '.join(lacking)}; fetch the GGUF file again, or "
            f"{_ELSEWHERE}"
        )


def _config_name(architecture: str) -> str:
    """The name by which transformers keeps the settings of an architecture of llama.cpp."""
    return "qwen3_moe" if architecture == "qwen3moe" else architecture


def outline(config: Any) -> Any:
    """The model that transformers makes of a configuration, with shapes in place of weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def check_shapes(path: Path, model: Any, shapes: Mapping[str, Collection[int]]) -> None:
    """Refuse a file whose tensors are not those of its settings, as far as their names and shapes tell.

    Args:
        path: The file, for messages.
        model: Its outline.
        shapes: Of the file's tensors, by name.

    Raises:
        RefusalError: Weights are missing or of other shapes.
    """
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    names: dict[str, list[str]] = {}
    for of_file, of_model in get_gguf_hf_weights_map(model).items():
        names.setdefault(of_model, []).append(of_file)
    missing, mismatched = [], []
    for name, weight in model.named_parameters():
        found = [shapes[of_file] for of_file in names.get(name, ()) if of_file in shapes]
        if found and not any(_lengths(shape) == _lengths(weight.shape) for shape in found):
            mismatched.append(name)
        elif not found and name in names:
            missing.append(name)
    check_whole(path, model, {"missing_keys": missing, "mismatched_keys": mismatched, "unexpected_keys": []})


def _lengths(shape: Collection[int]) -> list[int]:
    """The axes of a tensor in no order, as transformers turns some, and adds some of length 1."""
    return sorted(int(length) for length in shape if length > 1)


def check_whole(path: Path, model: Any, info: Mapping[str, Collection[str]]) -> None:
    """See to it that all weights of the model come from the file.

    Args:
        path: The file, for messages.
        model: What transformers made of it.
        info: What transformers tells of the loading, as for ``faults``.

    Raises:
        RefusalError: They do not.
    """
    missing, mismatched, _ = faults(info)
    kind = type(model).__name__
    if missing:
        raise RefusalError(
            f"{path} lacks {some(missing)}, which a {kind} of its settings has and which would be "
            "random; fetch the GGUF file again"
        )
    if mismatched:
        raise RefusalError(
            f"{path}: {some(mismatched)} {be(mismatched)} of another shape than a {kind} of its settings has; "
            f"{_ELSEWHERE}"
        )


def check_settings(path: Path, model: Any, fields: Mapping[str, object]) -> list[str]:
    """Refuse settings that change what the model computes and that transformers does not read.

    Args:
        path: The file, for messages.
        model: What transformers made of it.
        fields: The file's settings, general.architecture among them.

    Returns:
        A note on a window of attention that the export does without.

    Raises:
        RefusalError: There are others.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    architecture, notes = str(fields["general.architecture"]), []
    read = GGUF_CONFIG_MAPPING.get(_config_name(architecture), {})
    for key, neutral in _NEUTRAL.items():
        name = f"{architecture}.{key}"
        value = fields.get(name)
        of_config = getattr(model.config, key.rpartition(".")[2], None)
        if value is None or value in neutral or value == of_config or read.get(key) is not None:
            continue
        if key == _WINDOW:
            notes.append(
                f"{name} = {value} is not taken over from {path.name}: the export attends to all positions, which "
                "makes a difference to longer texts"
            )
        else:
            raise RefusalError(
                f"{path} has {name} = {value}, which transformers does not take over from a GGUF file: {_ANOTHER}"
            )
    for key, of_model in _as_made(model).items():
        name = f"{architecture}.{key}"
        value = fields.get(name)
        if isinstance(value, int | float) and of_model is not None and not math.isclose(value, of_model, rel_tol=1e-6):
            raise RefusalError(
                f"{path} has {name} = {value}, where the model that transformers makes of it has {of_model}: {_ANOTHER}"
            )
    scalar = getattr(model.config, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != model.config.head_dim:
        raise RefusalError(
            f"{path} does not say by what scores are divided, and transformers takes {scalar} for heads of "
            f"{model.config.head_dim}, which may be another model's; {_ELSEWHERE}"
        )
    return notes


def _as_made(model: Any) -> dict[str, float | None]:
    """What transformers may have taken its own default for, whatever the file says: by the file's keys."""
    rotary = next((module.inv_freq for module in model.modules() if hasattr(module, "inv_freq")), None)
    return {
        "rope.dimension_count": None if rotary is None else 2 * len(rotary),
        "rope.freq_base": getattr(model.config, "rope_theta", None),
        "attention.layer_norm_rms_epsilon": getattr(model.config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": getattr(model.config, "layer_norm_eps", None),
    }


def check_tensors(path: Path, model: Any, architecture: str, names: Iterable[str]) -> None:
    """Refuse tensors that transformers has no place for.

    Args:
        path: The file, for messages.
        model: What transformers made of it.
        architecture: By llama.cpp's name.
        names: Of the file's tensors.

    Raises:
        RefusalError: There are such.
    """
    import gguf

    (known,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    to_gguf = gguf.get_tensor_name_map(known, model.config.num_hidden_layers)
    placed = set()
    for name in model.state_dict():
        stem, _, kind = name.rpartition(".")
        # A weight is called from the whole model, or from a part of it, as transformers looks for it.
        called = (to_gguf.get_name(stem[start:]) for start in (0, *(at.end() for at in re.finditer(r"\.", stem))))
        placed |= {f"{short}.{kind}" for short in called if short is not None}
    left = [name for name in names if name not in placed and "_exp" not in name]  # experts are stored as one
    if left:
        them = "it" if len(left) == 1 else "them"
        raise RefusalError(
            f"{path} holds {some(left)}, for which transformers has no place in a {type(model).__name__} made of a "
            f"GGUF file: without {them} {_ANOTHER}"
        )


def rotary_modules(path: Path, model: Any, factors: int) -> list[Any]:
    """The modules of a model whose rotary frequencies so many factors divide.

    Raises:
        RefusalError: It has none, or others.
    """
    rotary = [module for module in model.modules() if hasattr(module, "inv_freq")]
    if not rotary or any(tuple(module.inv_freq.shape) != (factors,) for module in rotary):
        raise RefusalError(
            f"{path} holds {factors} factors of rotary frequencies ({ROPE_FACTORS}), which do not fit a "
            f"{type(model).__name__}; {_ELSEWHERE}"
        )
    return rotary
