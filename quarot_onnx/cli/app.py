"""The commands. Each one parses, builds a configuration, makes one call, and prints."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quarot_onnx.cli import inspected, render
from quarot_onnx.cli import options as opt
from quarot_onnx.cli.console import Bars, bars, notes, print_json, remark, say
from quarot_onnx.cli.evaluate_options import EvaluateOptions
from quarot_onnx.cli.generate_options import GenerateOptions
from quarot_onnx.cli.providing import provider_of
from quarot_onnx.cli.quantize_options import OutputOptions, QuantizeOptions
from quarot_onnx.cli.rotate_options import RotateOptions
from quarot_onnx.cli.signature import dashed, takes
from quarot_onnx.errors import ConfigError

if TYPE_CHECKING:
    from quarot_onnx.pipeline import Outcome

NAME = "quarot-onnx"

app = typer.Typer(
    name=NAME,
    help="Rotate and quantize ONNX language models; the result runs on stock onnxruntime.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": dashed},
)


@app.callback(invoke_without_command=True)
def _common(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed  # noqa: PLC0415

        say(installed("quarot-onnx"))
        raise typer.Exit


@app.command(epilog="Example: quarot-onnx export SmolLM2-135M/ onnx/")
def export(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A Hugging Face folder or a GGUF file.")],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A new or empty folder.")],
    dtype: Annotated[opt.Dtype, typer.Option(help="Type of the weights.")] = opt.Dtype.FP32,
    opset: Annotated[int | None, typer.Option(min=1, help="Opset of the graph.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export, and all files in OUT_DIR.")
    ] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Export a model to ONNX through optimum, offline (needs the extra [bold]export[/])."""
    from quarot_onnx.export.export import ExportDtype  # noqa: PLC0415 - every command imports what it needs
    from quarot_onnx.export.export import export as export_model  # noqa: PLC0415

    progress = None if quiet or as_json else remark
    kind = ExportDtype(dtype.value)
    told: list[str] = []
    path = export_model(
        source, out_dir, dtype=kind, opset=opset, overwrite=overwrite, progress=progress, note=told.append
    )
    print_json({"model": str(path), "notes": told}) if as_json else render.written(path)
    notes([] if as_json else told)


@app.command(epilog="Example: quarot-onnx inspect model.onnx --write-config rotation_config.json")
def inspect(
    model: opt.Model,
    write_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a rotation_config.json of what was found.")
    ] = None,
    rotation_config: opt.RotationFile = None,
    split_cache: opt.SplitCache = False,
    sinks: Annotated[
        bool, typer.Option("--sinks", help="Find the tokens whose activations are outliers, and a prefix for them.")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For --sinks. Default: Python's own documentation.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="PATH", help="For --sinks. Default: beside the model.")
    ] = None,
    text_key: opt.TextKey = None,
    bos: opt.UseBos = None,
    bos_id: opt.BosId = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing FILE.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Show what a model is, where rotations go, what they cost, and why anything is left out."""
    path = opt.model_file(model)
    from quarot_onnx.cli.inspecting import inspect_model  # noqa: PLC0415

    source = opt.tokenizer_path(tokenizer, path) if sinks else None
    given = {"--text": text, "--tokenizer": tokenizer, "--text-key": text_key, "--bos-id": bos_id}
    given["--bos" if bos else "--no-bos"] = bos
    needless = [option for option, value in given.items() if value is not None]
    if needless and not sinks:
        raise ConfigError(f"{needless[0]} is read for --sinks alone; add it, or leave {needless[0]} out")
    before = opt.bos_choice(bos, bos_id)
    content = inspect_model(path, rotation_config, write_config, split_cache=split_cache, overwrite=overwrite)
    if source is not None:
        if "quantized" in content:
            raise ConfigError(f"--sinks looks at float activations, and {path} is quantized: inspect the original")
        from quarot_onnx.calibration.bos import Bos  # noqa: PLC0415
        from quarot_onnx.cli.sinks import SinkText, find_sinks  # noqa: PLC0415

        with bars(quiet=as_json) as progress:
            content["sinks"] = find_sinks(path, SinkText(source, text, text_key, Bos.of(before)), progress)
    print_json(content) if as_json else inspected.show(content)


@app.command(epilog="Example: quarot-onnx rotate model.onnx rotated/model.onnx --random-had --seed 1")
@takes(RotateOptions)
def rotate(options: RotateOptions) -> None:
    """Write the rotated float model. Without options: R1, R2 and R4 where the model allows them."""
    source = opt.model_file(options.model)
    from quarot_onnx.cli.rotating import run  # noqa: PLC0415

    _report(options, lambda progress: run(options, source, progress))


@app.command(
    epilog="Examples: quarot-onnx quantize model.onnx int8/model.onnx   |   "
    "quarot-onnx quantize model.onnx static/model.onnx --scheme w8a8-static --calib-text train.txt --tokenizer model/"
    "   |   quarot-onnx quantize model.onnx w4a8/model.onnx --w-bits 4 --a-bits 8 --calib-text train.txt"
)
@takes(QuantizeOptions)
def quantize(options: QuantizeOptions) -> None:
    """Rotate as the scheme needs (R1+R2; R4 with quantized activations), prove it, and quantize to 2 to 8 bits."""
    source = opt.model_file(options.model)
    from quarot_onnx.cli.quantizing import run  # noqa: PLC0415

    _report(options, lambda progress: run(options, source, progress))


@app.command(epilog="Example: quarot-onnx optimize int8/model.onnx here/model.onnx")
def optimize(
    model: opt.Model,
    out: opt.Target,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
) -> None:
    """Write onnxruntime's optimised copy of a model: it opens faster, on this kind of processor alone."""
    source = opt.model_file(model)
    from quarot_onnx.cli.targets import target_file  # noqa: PLC0415
    from quarot_onnx.run.optimizing import optimize as write_copy  # noqa: PLC0415

    target = target_file(out, source, overwrite=overwrite)
    saved = write_copy(source, target, overwrite=overwrite or None)
    print_json(render.saved_record(saved)) if as_json else render.optimized(saved)


def _report(options: OutputOptions, work: Callable[[Bars], "Outcome"]) -> None:
    """Do the work with progress bars, and print what came of it."""
    from quarot_onnx.threads import limited_to  # noqa: PLC0415

    on = provider_of(options.provider, options.provider_option)
    with limited_to(options.jobs), on, bars(quiet=options.quiet or options.as_json) as progress:
        try:
            outcome = work(progress)
        except BaseException as error:
            # What an interrupted run keeps, to go on from.
            notes(getattr(error, "__notes__", ()))
            raise
    notes(outcome.notes)
    print_json(render.outcome_record(outcome)) if options.as_json else render.outcome(outcome)


@app.command(epilog="Example: quarot-onnx verify model.onnx rotated/model.onnx")
def verify(
    model_a: Annotated[Path, typer.Argument(metavar="MODEL_A", help="The original.")],
    model_b: Annotated[Path, typer.Argument(metavar="MODEL_B", help="The model to check.")],
    tokens: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=opt.MOST_TOKENS, help="Tokens of random ids, and as many of real text."),
    ] = 128,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="Seed of the random ids.")] = 0,
    feeds: opt.Feeds = None,
    provider: opt.Provider = None,
    provider_option: opt.ProviderOption = None,
    max_memory: opt.MaxMemory = None,
    by_stages: opt.ByStages = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Prove that two float models compute the same; exit status 1 if they do not."""
    first, second = opt.model_file(model_a), opt.model_file(model_b)
    from quarot_onnx.cli.verifying import run  # noqa: PLC0415
    from quarot_onnx.evaluation.equivalence import require  # noqa: PLC0415
    from quarot_onnx.evaluation.report import equivalence_record  # noqa: PLC0415
    from quarot_onnx.piecewise.memory import Memory  # noqa: PLC0415

    memory = Memory.of(max_memory, by_stages)
    with provider_of(provider, provider_option), bars(quiet=quiet or as_json) as progress:
        progress("verify", 0, None)
        result = run(first, second, tokens=tokens, seed=seed, feeds=feeds, memory=memory)
        content = equivalence_record(result)
    print_json(content) if as_json else render.equivalence(content)
    require(result)


@app.command(epilog="Example: quarot-onnx compare model.onnx int8/model.onnx --text test.txt --max-ppl-ratio 1.02")
def compare(
    original: Annotated[Path, typer.Argument(metavar="FLOAT", help="The float model.")],
    quantized: Annotated[Path, typer.Argument(metavar="QUANTIZED", help="The quantized one.")],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text. Default: Python's documentation.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A folder or a tokenizer.json. Default: beside FLOAT.")
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=8, max=opt.MOST_TOKENS, help="Tokens compared.")] = 2048,
    text_key: opt.TextKey = None,
    bos: opt.UseBos = None,
    bos_id: opt.BosId = None,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="onnxruntime's threads.")] = None,
    max_kl: opt.MaxKl = None,
    max_ppl_ratio: opt.MaxPplRatio = None,
    provider: opt.Provider = None,
    provider_option: opt.ProviderOption = None,
    max_memory: opt.MaxMemory = None,
    by_stages: opt.ByStages = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """How near a quantized model comes to its original on this processor; exit status 1 past a limit."""
    first, second = opt.model_file(original), opt.model_file(quantized)
    chosen = opt.bos_choice(bos, bos_id)
    from quarot_onnx.calibration.bos import Bos  # noqa: PLC0415
    from quarot_onnx.cli.comparing import limits_of, run  # noqa: PLC0415
    from quarot_onnx.evaluation.check import Check  # noqa: PLC0415
    from quarot_onnx.evaluation.fidelity import require  # noqa: PLC0415
    from quarot_onnx.evaluation.report import fidelity_record  # noqa: PLC0415
    from quarot_onnx.piecewise.memory import Memory  # noqa: PLC0415

    limits = limits_of(max_kl, max_ppl_ratio)
    check = Check(tokens=tokens, text=text, text_key=text_key, tokenizer=tokenizer, bos=Bos.of(chosen), limits=limits)
    with provider_of(provider, provider_option), bars(quiet=quiet or as_json) as progress:
        progress("check", 0, None)
        result = run(first, second, check, threads, Memory.of(max_memory, by_stages))
        content = fidelity_record(result)
    print_json(content) if as_json else render.comparison(content)
    require(result)


@app.command(
    epilog="Examples: quarot-onnx evaluate model.onnx --text wiki.test.raw --tokenizer model/   |   "
    "quarot-onnx evaluate model.onnx --tasks piqa,arc_easy --batch-size 4"
)
@takes(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Perplexity of a model, float or quantized, on a text; or how well it does tasks of lm-eval."""
    path = opt.model_file(options.model)
    from quarot_onnx.cli.evaluating import run  # noqa: PLC0415

    with provider_of(options.provider, options.provider_option):
        run(options, path)


@app.command(
    epilog="Examples: quarot-onnx generate model.onnx --prompt 'The capital of France is'   |   "
    "quarot-onnx generate int8/ --chat --prompt 'Why is the sky blue?' --temperature 0.7 --top-p 0.9 --seed 1"
)
@takes(GenerateOptions)
def generate(options: GenerateOptions) -> None:
    """Read what a model says, float or quantized; speeds of prefill and decode on standard error."""
    path = opt.model_file(options.model)
    from quarot_onnx.cli.generating import run  # noqa: PLC0415

    with provider_of(options.provider, options.provider_option):
        run(options, path)


@app.command(epilog="Example: quarot-onnx demo --out demo")
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where models and results.json go.")] = Path("demo"),
    windows: Annotated[int, typer.Option(metavar="N", min=1, help="Windows of 512 tokens per perplexity.")] = 8,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """SmolLM2-135M from GGUF to rotated, quantized ONNX models, with a table of what each costs and saves."""
    from quarot_onnx.demo import run_demo  # noqa: PLC0415

    results = run_demo(out, windows=windows, say=None if quiet or as_json else remark)
    print_json(results) if as_json else render.demo(results)
