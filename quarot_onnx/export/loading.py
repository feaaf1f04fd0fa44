"""The torch model that the child exports: all its weights come from the source, and all of the source's go into it.

transformers draws at random what a checkpoint lacks and leaves out what its config has no place for, with a warning
that nobody reads. Here both are refused by name.
"""

# ruff: noqa: PLC0415

import difflib
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from quarot_onnx.errors import first_and_more
from quarot_onnx.export.source import own_code, weight_files

TASK = "text-generation-with-past"

ELSEWHERE = (
    "export it with torch.onnx.export or the builder of onnxruntime-genai (python -m onnxruntime_genai.models.builder "
    "-p fp32 -e cpu), and go on from there: what is rotated goes by no architecture"
)
"""What to do with a model that is not exported here."""

_SHOWN = 3
_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.\w+|masked_bias|causal_mask|attn\.bias|attention\.bias|position_ids|(en|de)coder\.version)$"
)
"""What old checkpoints keep beside their weights, and models make anew."""


class RefusalError(Exception):
    """A request that cannot be carried out, in the user's words."""


def load_folder(source: Path, dtype: str) -> tuple[Any, list[str]]:
    """The model of a Hugging Face folder in ``fp32`` or ``fp16``, and notes on what is not of it.

    Raises:
        RefusalError: Weights are missing, of other shapes, without a place in the model, or not those that are used.
    """
    from optimum.exporters.utils import DisableCompileContextManager
    from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(source, **where)
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "mxfp4":
        where["quantization_config"] = Mxfp4Config(dequantize=True)
    weight_type = torch_dtype(dtype)
    where |= {"dtype": weight_type, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with DisableCompileContextManager():
        model, info = AutoModelForCausalLM.from_pretrained(source, **where)
    for weight in model.parameters():
        if str(weight.dtype) == "torch.bfloat16":  # what MXFP4 is dequantized to
            weight.data = weight.data.to(weight_type)
    notes = check_whole(source, model, info)
    check_shared(source, model)
    if code := own_code(source):
        notes.append(
            f"{source} has code of its own ({code}, by auto_map in its config.json), which is not run: the export is "
            f"transformers' {type(model).__name__}, another model where the two differ"
        )
    return model, [*notes, *frozen_rope(model)]


def check_architecture(source: Path, model_type: str) -> None:
    """Refuse an architecture that transformers has no causal language model of, or that takes code of the model's own.

    Raises:
        RefusalError: It is one.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if model_type in KNOWN:
        return
    if code := own_code(source):
        raise RefusalError(
            f"{source} has code of its own ({code}, by auto_map in its config.json), which is not run, and "
            f"transformers knows no architecture {model_type!r}; export it where that code may run, with "
            f"torch.onnx.export, or: optimum-cli export onnx --model {source} --task {TASK} --trust-remote-code OUT"
        )
    near = difflib.get_close_matches(model_type, KNOWN, n=3)
    hint = f"; it has {', '.join(near)} and others" if near else ""
    raise RefusalError(
        f"{source} is of architecture {model_type!r}, of which transformers has no causal language model{hint}; "
        f"{ELSEWHERE}"
    )


def check_whole(source: Path, model: Any, info: Mapping[str, Collection[str]]) -> list[str]:
    """See to it that the model has its weights from ``source`` and nothing of it is left out.

    Args:
        source: What was loaded.
        model: What transformers made of it.
        info: What transformers tells of the loading: names under missing_keys, mismatched_keys and unexpected_keys.

    Returns:
        A note where the source holds more than a language model, such as another head beside its own.

    Raises:
        RefusalError: Weights are missing, of other shapes or without a place in the model.
    """
    missing, mismatched, unexpected = faults(info)
    kind = type(model).__name__
    if missing:
        raise RefusalError(_lacking(source, model, missing))
    if mismatched:
        raise RefusalError(
            f"{source}: {some(mismatched)} {be(mismatched)} of another shape than its config.json says; take the "
            "config.json that belongs to these weights"
        )
    inner = getattr(model, model.base_model_prefix, model)
    parts = {name for module in (model, inner) for name, _ in module.named_children()} | {model.base_model_prefix}
    if dropped := [name for name in unexpected if name.split(".")[0] in parts]:
        raise RefusalError(
            f"{source} holds {some(dropped)}, for which a {kind} of its configuration has no place: without "
            f"{'it' if len(dropped) == 1 else 'them'} the export would be another model; mend config.json, or, if "
            "nothing is lost, load and save_pretrained the model with transformers and export that"
        )
    return [f"not exported, as a {kind} has no such part: {some(unexpected)}"] if unexpected else []


def faults(info: Mapping[str, Collection[str]]) -> tuple[list[str], list[str], list[str]]:
    """Names of weights that are missing, of other shapes and without a place, by what transformers tells."""

    def names(kind: str) -> list[str]:
        keys: Any = info[f"{kind}_keys"]  # those of other shapes come with both shapes
        every = (key if isinstance(key, str) else key[0] for key in keys)
        return sorted(name for name in every if not _BUFFERS.search(name))

    return names("missing"), names("mismatched"), names("unexpected")


def check_shared(source: Path, model: Any) -> None:
    """Refuse a folder that holds a head of its own where its configuration shares the embedding's weights.

    Raises:
        RefusalError: It does: transformers would leave the head out without a word.
    """
    import torch

    every = dict(model.named_parameters(remove_duplicate=False))
    shared = every.keys() - dict(model.named_parameters()).keys()
    for name, stored in _stored(source, shared):
        used = every[name]
        if stored.shape != used.shape or not torch.equal(stored.to(used.dtype), used):
            other = next(key for key, weight in every.items() if weight is used and key != name)
            raise RefusalError(
                f"{source} holds a {name} that is not {other}, though its config.json says that they are one "
                f'("tie_word_embeddings": true): set it to false to export {name}, or, where the configuration is '
                "right, load and save_pretrained the model with transformers and export that"
            )


def _stored(source: Path, names: Set[str]) -> Iterator[tuple[str, Any]]:
    """The tensors of these names that a folder's weights hold, from the files that transformers reads."""
    import safetensors
    import torch

    for path in weight_files(source):
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                for name in sorted(names & {*file.keys()}):
                    yield name, file.get_tensor(name)
        else:
            stored = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
            yield from ((name, stored[name]) for name in sorted(names & stored.keys()))


def frozen_rope(model: Any) -> list[str]:
    """A note where rotary frequencies change with the text's length: the trace holds those of short texts alone."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if kind not in ("dynamic", "longrope"):
            continue
        config = module.config
        limit = getattr(config, "original_max_position_embeddings", None) if kind == "longrope" else None
        limit = limit or config.max_position_embeddings
        note = (
            f"the export keeps the rotary frequencies of short texts (rope_scaling {kind}): past {limit} positions it "
            "differs from the model in torch, which changes them there"
        )
        return [note]
    return []


def _lacking(source: Path, model: Any, missing: list[str]) -> str:
    """Why weights are missing: the checkpoint is of a class without a head, or it is not whole."""
    kind = type(model).__name__
    declared = (getattr(model.config, "architectures", None) or [kind])[0]
    head = model.get_output_embeddings()
    heads = {
        f"{name}.{part}" for name, module in model.named_modules() if module is head for part in ("weight", "bias")
    }
    if declared != kind and set(missing) <= heads:
        return (
            f"{source} is a {declared}, which has no language model head ({', '.join(missing)}): its logits would be "
            f"random; export the {kind} that it was made from, or its hidden states with: optimum-cli export onnx "
            "--task feature-extraction"
        )
    return (
        f"{source} lacks {some(missing)}, which a {kind} of its configuration has and which would be random; fetch "
        "its weights again, or the config.json that belongs to them"
    )


def some(names: list[str]) -> str:
    """A few of the names, and how many more there are."""
    return first_and_more(names, _SHOWN)


def be(names: list[str]) -> str:
    """The verb of so many names."""
    return "is" if len(names) == 1 else "are"


def torch_dtype(dtype: str) -> Any:
    """The type of the weights in torch, by optimum's name."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16}[dtype]


def no_tokenizer(why: str) -> str:
    """The note where none comes out."""
    return (
        f"no tokenizer.json was written, as {why}; evaluate, generate and calibration on a text need it beside the "
        "model, or named with --tokenizer"
    )


def one_line(error: Exception) -> str:
    """An error's message, shortened."""
    return " ".join(str(error).split())[:200] or type(error).__name__
