"""The torch model of a GGUF file.

transformers takes over the tensors and settings of a GGUF file that it knows and leaves the others out in silence. What
would change the model is made up for here, or refused.
"""

# ruff: noqa: PLC0415

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quarot_onnx.export.gguf_checks import (
    ROPE_FACTORS,
    check_file,
    check_settings,
    check_shapes,
    check_tensors,
    check_whole,
    outline,
    rotary_modules,
)
from quarot_onnx.export.loading import RefusalError, check_architecture, no_tokenizer, one_line, torch_dtype
from quarot_onnx.export.unlisted import is_listed

_TOKENS = "tokenizer.ggml.tokens"
_LISTS = (_TOKENS, "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.scores")


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
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith(_LISTS)}
    check_file(path, fields)
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(path.parent, **where)
    notes, factors = _check(path, config, fields, {tensor.name: tensor for tensor in reader.tensors})
    where |= {"config": config, "dtype": torch_dtype(dtype)}
    where |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = AutoModelForCausalLM.from_pretrained(path.parent, **where)
    check_whole(path, model, info)
    if fields["general.architecture"] == "qwen3moe":
        normalise_experts(model)
    if factors is not None:
        divide_frequencies(path, model, gguf.dequantize(factors.data, factors.tensor_type))
        notes.append(
            f"{ROPE_FACTORS}, the rotary scaling of {path.name}, is in the graph; config.json, which transformers "
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


def _check(path: Path, config: Any, fields: Mapping[str, object], tensors: dict[str, Any]) -> tuple[list[str], Any]:
    """Refuse what can be seen to be another model before weights are dequantized, which takes minutes.

    Returns:
        Notes, and the tensor of what divides the rotary frequencies, if there is one.
    """
    check_architecture(path, str(config.model_type))
    if not is_listed(config.model_type):
        raise RefusalError(
            f"{path} is of architecture {config.model_type!r}, of which no GGUF files are exported: what transformers "
            "makes of them was never compared; export the Hugging Face folder that it was made from"
        )
    model = outline(config)
    check_shapes(path, model, {name: tensor.shape for name, tensor in tensors.items()})
    notes = check_settings(path, model, fields)
    factors = tensors.pop(ROPE_FACTORS, None)
    check_tensors(path, model, str(fields["general.architecture"]), tensors)
    if factors is not None:
        rotary_modules(path, model, int(factors.n_elements))
    return notes, factors


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
    for module in rotary_modules(path, model, divisors.numel()):
        module.inv_freq /= divisors
