"""The ``evaluate`` command: the perplexity of a text, or tasks."""

import logging
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from quarot_onnx.calibration.bos import Bos
from quarot_onnx.cli import options as opt
from quarot_onnx.cli import render
from quarot_onnx.cli.bounding import tell_of_limit
from quarot_onnx.cli.console import Bars, bars, notes, print_json, say
from quarot_onnx.cli.evaluate_options import EvaluateOptions, PerplexityOptions, TaskOptions
from quarot_onnx.cli.scheduling import quiet_scheduler
from quarot_onnx.errors import ConfigError
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.progress import of_phase

_WINDOWS = 20

_Show = Callable[[], None]


def run(options: EvaluateOptions, model: Path) -> None:
    """Evaluate and print.

    Raises:
        ConfigError: Options of tasks beside those of a perplexity, or neither.
        InputError: Model, tokenizer, text or tasks do not fit.
    """
    _require_one(options)
    tokenizer = opt.tokenizer_path(options.tokenizer, model)
    bos = Bos.of(opt.bos_choice(options.bos, options.bos_id))
    if options.scheduler is None:  # else it is the workers' memory
        tell_of_limit(Memory.of(options.max_memory, options.by_stages), map(model_io.load, (model,)))
    evaluate = _perplexity if options.text is not None else _tasks
    with bars(quiet=options.quiet or options.as_json) as progress:
        show = evaluate(options, model, tokenizer, bos, progress)
    show()


def _require_one(options: EvaluateOptions) -> None:
    """Refuse what only the other one of the two reads."""
    of_text, of_tasks = _given(options, PerplexityOptions), _given(options, TaskOptions)
    if options.text is None and options.tasks is None:
        raise ConfigError("nothing to evaluate on: name a text for its perplexity (--text FILE), or --tasks NAME,...")
    if of_text and of_tasks:
        raise ConfigError(
            f"{', '.join(of_tasks)} and {', '.join(of_text)} go with tasks and with a perplexity: two runs; leave out "
            "the one or the other"
        )


def _given(options: EvaluateOptions, kind: type) -> list[str]:
    """The options of a kind that were typed."""
    names = (field.name for field in fields(kind) if getattr(options, field.name) is not None)
    return [f"--{name.replace('_', '-')}" for name in names]


def _perplexity(options: EvaluateOptions, model: Path, tokenizer: Path, bos: int | Bos, progress: Bars) -> _Show:
    from quarot_onnx.evaluation.perplexity import perplexity  # noqa: PLC0415 - each of the two imports what it needs
    from quarot_onnx.evaluation.report import perplexity_record  # noqa: PLC0415

    assert options.text is not None
    result = perplexity(
        model, options.text, tokenizer, seq_len=options.seq_len,
        windows=_WINDOWS if options.windows is None else options.windows,
        threads=options.threads, bos=bos, text_key=options.text_key, exact=options.exact,
        unscored=options.unscored or 1, decode=options.decode or 0,
        memory=Memory.of(options.max_memory, options.by_stages), scheduler=quiet_scheduler(options.scheduler),
        progress=of_phase(progress, "evaluate"),
    )  # fmt: skip
    content = perplexity_record(result) | {"model": str(model), "text": str(options.text)}

    def show() -> None:
        notes(result.notes)
        print_json(content) if options.as_json else render.perplexity(content)

    return show


def _tasks(options: EvaluateOptions, model: Path, tokenizer: Path, bos: int | Bos, progress: Bars) -> _Show:
    # lm-eval's own bars, which the libraries it stands on read when they are imported; ours tell the same.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for talkative in ("lm_eval", "datasets", "huggingface_hub"):  # what stops a task is told in one line of ours
        logging.getLogger(talkative).setLevel(logging.CRITICAL)
    from quarot_onnx.evaluation.tasks import evaluate_tasks  # noqa: PLC0415

    names = [name for given in options.tasks or () for name in given.split(",") if name]
    result = evaluate_tasks(
        model, tokenizer, names, include_path=options.include_path, limit=options.limit,
        num_fewshot=options.num_fewshot, batch_size=options.batch_size or 1, bos=bos, threads=options.threads,
        exact=options.exact, memory=Memory.of(options.max_memory, options.by_stages),
        scheduler=quiet_scheduler(options.scheduler), progress=progress,
    )  # fmt: skip

    def show() -> None:
        notes(result.notes)
        if options.as_json:
            print_json({**result.record, "notes": list(result.notes)})
            return
        for table in result.tables:
            say(table)

    return show
