"""The torch model of a GGUF file.

transformers takes over the tensors and settings of a GGUF file that it knows and leaves the others out in silence. What
would change the model is made up for here, or refused.
"""

# ruff: noqa: PLC0415

import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quarot_onnx.export.loading import (
    RefusalError,
    be,
    check_architecture,
    faults,
    no_tokenizer,
    one_line,
    some,
    torch_dtype,
)

_ROPE_FACTORS = "rope_freqs.weight"
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

_TOKENS = "tokenizer.ggml.tokens"
_LISTS = (_TOKENS, "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.scores")
_ELSEWHERE = "export the Hugging Face folder that the file was made from"
_ANOTHER = f"the export would be another model; {_ELSEWHERE}"


def load_gguf(path: Path, dtype: str) -> tuple[Any, Any, list[str]]:
    """The model of a GGUF file, dequantized to ``fp32`` or ``fp16``, its tokenizer, if any, and what is good to know.

    Raises:
        RefusalError: The file is damaged, of an architecture that is not known, lacks weights or holds some that
            transformers would leave out.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise RefusalError(f"{path} is truncated or damaged ({one_line(error)}); fetch the GGUF file again") from error
    from transformers import AutoModelForCausalLM

    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith(_LISTS)}
    check_file(path, fields)
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "dtype": torch_dtype(dtype)}
    where |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = AutoModelForCausalLM.from_pretrained(path.parent, **where)
    check_architecture(path, str(model.config.model_type))
    _check_whole(path, model, info)
    if fields["general.architecture"] == "qwen3moe":
        normalise_experts(model)
    notes = check_settings(path, model, fields)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = tensors.pop(_ROPE_FACTORS, None)
    check_tensors(path, model, str(fields["general.architecture"]), tensors)
    if factors is not None:
        divide_frequencies(path, model, gguf.dequantize(factors.data, factors.tensor_type))
        notes.append(
            f"{_ROPE_FACTORS}, the rotary scaling of {path.name}, is in the graph; config.json, which transformers "
            "makes of a GGUF file, does not name it"
        )
    try:
        tokenizer = _tokenizer(path, reader.fields)
        if (
            fields.get("tokenizer.ggml.add_bos_token") is False
            and tokenizer.bos_token_id in tokenizer("a").input_ids[:1]
        ):
            notes.append(
                f"{path.name} asks for no token in front of texts (tokenizer.ggml.add_bos_token), and the tokenizer "
                f"that transformers makes of it puts {tokenizer.bos_token} there; --no-bos goes without"
            )
    except Exception as error:  # noqa: BLE001 -- transformers and tokenizers raise anything
        tokenizer = None
        notes.append(no_tokenizer(f"transformers makes no tokenizer of {path.name} ({one_line(error)})"))
    return model, tokenizer, notes


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


def _check_whole(path: Path, model: Any, info: Mapping[str, Collection[str]]) -> None:
    """See to it that all weights of the model come from the file, by what transformers tells of the loading."""
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


def _tokenizer(path: Path, fields: Mapping[str, Any]) -> Any:
    """The tokenizer that the file describes.

    transformers takes the token that begins a text for the one that ends it, too, which chat templates then write.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    end = fields.get("tokenizer.ggml.eos_token_id")
    if end is not None:
        tokenizer.eos_token = fields[_TOKENS].contents(int(end.contents()))
    return tokenizer


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


def normalise_experts(model: Any) -> None:
    """Let the weights of chosen experts add up to 1, as in llama.cpp, which has no setting for it."""
    model.config.norm_topk_prob = True
    for module in model.modules():
        if hasattr(module, "norm_topk_prob"):
            module.norm_topk_prob = True


def divide_frequencies(path: Path, model: Any, factors: np.ndarray) -> None:
    """Divide the rotary frequencies by ``factors`` (head_dim / 2,), as llama.cpp does.

    Raises:
        RefusalError: The model has none, or others.
    """
    import torch

    divisors = torch.from_numpy(np.array(factors, np.float32))
    rotary = [module for module in model.modules() if hasattr(module, "inv_freq")]
    if not rotary or any(module.inv_freq.shape != divisors.shape for module in rotary):
        raise RefusalError(
            f"{path} holds {divisors.numel()} factors of rotary frequencies ({_ROPE_FACTORS}), which do not fit a "
            f"{type(model).__name__}; {_ELSEWHERE}"
        )
    for module in rotary:
        module.inv_freq /= divisors
