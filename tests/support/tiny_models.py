"""Tiny transformers models with seeded random weights, and a byte-level tokenizer for them.

All weights are drawn from one seeded generator, gammas and biases included: a gamma of one or a bias of zero
would hide a fold that was forgotten.
"""

from pathlib import Path
from typing import Any

import torch
from exports import ARCHITECTURES, BOS, COMMON
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer, ids 0..255, with ``<s>`` (put first) and ``</s>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def hf_model(arch: str, *, tied: bool = False, seed: int = 0, attention: str = "sdpa", **config: Any) -> Any:
    """A float32 transformers model in eval mode; ``config`` overrides its row of ``ARCHITECTURES``."""
    settings = COMMON | ARCHITECTURES[arch] | {"tie_word_embeddings": tied} | config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **settings), attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    centre = 0.0 if arch == "gemma3_text" else 1.0  # Gemma's gamma is 1 + weight
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 2:  # Linears keep the variance of their input; the table feeds a stream of order one
                value.copy_(noise * (1.0 if "embed" in name else value.shape[1] ** -0.5))
            elif name.endswith("bias"):
                value.copy_(0.3 * noise)
            else:
                value.copy_(centre + 0.3 * noise.clamp(-2, 2))
        if tied:
            model.get_input_embeddings().weight.mul_(value.new_tensor(0.25))
    return model.eval()
