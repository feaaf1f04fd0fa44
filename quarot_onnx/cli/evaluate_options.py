"""The options of ``evaluate``: those of a perplexity, those of tasks, and those of both."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from quarot_onnx.cli import options as opt

PERPLEXITY, TASKS = "Perplexity on a text", "Tasks of lm-eval (extra eval)"


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions:
    """What a perplexity alone reads."""

    text: Annotated[
        Path | None, Option(metavar="FILE", help="UTF-8 text, or JSON lines.", rich_help_panel=PERPLEXITY)
    ] = None
    seq_len: Annotated[
        int | None,
        Option(
            metavar="L",
            min=2,
            help="Tokens of a window, BOS among them. Default: 512, or as many as the model has positions for.",
            rich_help_panel=PERPLEXITY,
        ),
    ] = None
    windows: Annotated[
        int | None,
        Option(metavar="N", min=0, help="Windows; 0 for the whole text. Default: 20.", rich_help_panel=PERPLEXITY),
    ] = None
    unscored: Annotated[
        int | None,
        Option(
            metavar="N",
            min=1,
            help="Tokens at the start of a window that are not scored. Default: 1.",
            rich_help_panel=PERPLEXITY,
        ),
    ] = None
    decode: Annotated[
        int | None,
        Option(
            metavar="N",
            min=1,
            help="Tokens at the end of a window that are decoded one by one, through the cache. Default: none.",
            rich_help_panel=PERPLEXITY,
        ),
    ] = None
    text_key: Annotated[
        str | None, Option("--text-key", metavar="KEY", help=opt.TEXT_KEY_HELP, rich_help_panel=PERPLEXITY)
    ] = None


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What tasks alone read."""

    tasks: Annotated[
        list[str] | None,
        Option(metavar="NAME,...", help="Names of tasks or groups, or patterns.", rich_help_panel=TASKS),
    ] = None
    include_path: Annotated[
        Path | None, Option(metavar="DIR", help="A folder with YAML files of your own tasks.", rich_help_panel=TASKS)
    ] = None
    num_fewshot: Annotated[
        int | None,
        Option(metavar="K", min=0, help="Solved items before each. Default: as the task says.", rich_help_panel=TASKS),
    ] = None
    limit: Annotated[
        float | None, Option(metavar="N", help="Items of each task; below 1 a share of them.", rich_help_panel=TASKS)
    ] = None
    batch_size: Annotated[
        int | None, Option(metavar="B", min=1, help="Rows that are run at once. Default: 1.", rich_help_panel=TASKS)
    ] = None


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(TaskOptions, PerplexityOptions):
    """All options of ``evaluate``."""

    model: opt.Model
    tokenizer: Annotated[
        Path | None, Option(metavar="PATH", help="A folder or a tokenizer.json. Default: beside the model.")
    ] = None
    bos: opt.UseBos = None
    bos_id: opt.BosId = None
    threads: Annotated[int | None, Option(metavar="N", min=1, help="onnxruntime's threads.")] = None
    exact: Annotated[
        bool, Option("--exact", help="Compute 8-bit products exactly, where the processor's fast way is not.")
    ] = False
    provider: opt.Provider = None
    provider_option: opt.ProviderOption = None
    max_memory: opt.MaxMemory = None
    by_stages: opt.ByStages = None
    scheduler: opt.Scheduler = None
    as_json: opt.Json = False
    quiet: opt.Quiet = False
