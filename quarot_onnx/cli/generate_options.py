"""The options of ``generate``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from quarot_onnx.cli import options as opt

_SAMPLING = "Sampling"


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """All options of ``generate``."""

    model: opt.Model
    prompt: Annotated[
        list[str] | None, Option(metavar="TEXT", help="What the model goes on with; each one is a run of its own.")
    ] = None
    prompt_file: Annotated[
        list[Path] | None,
        Option(
            metavar="FILE", help="The same from a UTF-8 file, all of it but its last line end; - for standard input."
        ),
    ] = None
    chat: Annotated[
        bool, Option("--chat", help="The prompt is a user's turn, written as the model's chat template says.")
    ] = False
    max_new_tokens: Annotated[
        int | None, Option(min=1, metavar="N", help="Tokens, at most. Default: 128, or what there is room for.")
    ] = None
    tokenizer: Annotated[
        Path | None, Option(metavar="PATH", help="A folder or a tokenizer.json. Default: beside the model.")
    ] = None
    bos: Annotated[
        bool | None,
        Option(
            "--bos/--no-bos",
            help="Force the token in front of the prompt, or none. Default: as the tokenizer's files say.",
        ),
    ] = None
    bos_id: opt.BosId = None
    threads: Annotated[int | None, Option(metavar="N", min=1, help="onnxruntime's threads.")] = None
    provider: opt.Provider = None
    provider_option: opt.ProviderOption = None
    max_memory: opt.MaxMemory = None
    by_stages: opt.ByStages = None
    exact: Annotated[
        bool, Option("--exact", help="Compute 8-bit products exactly, where the processor's fast way is not.")
    ] = False
    greedy: Annotated[
        bool, Option("--greedy", help="The likeliest token each time: the default.", rich_help_panel=_SAMPLING)
    ] = False
    temperature: Annotated[
        float | None,
        Option(metavar="T", help="Draw from softmax(logits / T). Default: 1.", rich_help_panel=_SAMPLING),
    ] = None
    top_k: Annotated[
        int | None, Option(min=1, metavar="K", help="From the K likeliest tokens.", rich_help_panel=_SAMPLING)
    ] = None
    top_p: Annotated[
        float | None,
        Option(metavar="P", help="From the likeliest that make up P, up to 1.", rich_help_panel=_SAMPLING),
    ] = None
    seed: Annotated[
        int | None, Option(min=0, metavar="S", help="Of every prompt's draws. Default: 0.", rich_help_panel=_SAMPLING)
    ] = None
    as_json: opt.Json = False
