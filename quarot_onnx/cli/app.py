"""The commands. Each one parses, builds a configuration, makes one call, and prints."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from quarot_onnx.cli import options as opt
from quarot_onnx.cli import render
from quarot_onnx.cli.console import bars, notes, print_json, remark

NAME = "quarot-onnx"

app = typer.Typer(
    name=NAME,
    help="Rotate and quantize ONNX language models; the result runs on stock onnxruntime.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _common(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed  # noqa: PLC0415

        sys.stdout.write(installed("quarot-onnx") + "\n")
        raise typer.Exit


@app.command(epilog="Example: quarot-onnx export SmolLM2-135M/ onnx/")
def export(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A Hugging Face folder or a GGUF file.")],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A new or empty folder.")],
    dtype: Annotated[opt.Dtype, typer.Option(help="Type of the weights.")] = opt.Dtype.FP32,
    opset: Annotated[int | None, typer.Option(min=1, help="Opset of the graph.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in OUT_DIR.")] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Export a model to ONNX through optimum, offline (needs the extra [bold]export[/])."""
    from quarot_onnx.export import ExportDtype  # noqa: PLC0415 - every command imports what it needs
    from quarot_onnx.export import export as export_model  # noqa: PLC0415

    progress = None if quiet or as_json else remark
    kind = ExportDtype(dtype.value)
    path = export_model(source, out_dir, dtype=kind, opset=opset, overwrite=overwrite, progress=progress)
    print_json({"model": str(path)}) if as_json else render.written(path)


@app.command(epilog="Example: quarot-onnx inspect model.onnx --write-config rotation_config.json")
def inspect(
    model: opt.Model,
    write_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a rotation_config.json of what was found.")
    ] = None,
    rotation_config: opt.RotationFile = None,
    as_json: opt.Json = False,
) -> None:
    """Show what a model is, where rotations go, what they cost, and why anything is left out."""
    path = opt.model_file(model)
    from quarot_onnx.cli.inspecting import inspect_model  # noqa: PLC0415

    content = inspect_model(path, rotation_config, write_config)
    print_json(content) if as_json else render.inspection(content)


@app.command(epilog="Example: quarot-onnx rotate model.onnx rotated/model.onnx --random-had --seed 1")
def rotate(
    model: opt.Model,
    out: opt.Target,
    r1: opt.R1 = None,
    r2: opt.R2 = None,
    r3: opt.R3 = None,
    r4: opt.R4 = None,
    rotation_config: opt.RotationFile = None,
    r_matrix_dim: opt.RMatrixDim = None,
    random_had: opt.RandomHad = False,
    seed: opt.Seed = 0,
    block_size: opt.BlockSize = None,
    r1_matrix: opt.R1Matrix = None,
    r2_matrix: opt.R2Matrix = None,
    verify: opt.Verify = True,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write the rotated float model. Without options: R1, R2 and R4 where the model allows them."""
    source = opt.model_file(model)
    from quarot_onnx.cli.configs import quarot_config  # noqa: PLC0415
    from quarot_onnx.pipeline import rotate as rotate_model  # noqa: PLC0415

    config = quarot_config(
        r1=r1, r2=r2, r3=r3, r4=r4, rotation_config=rotation_config, r_matrix_dim=r_matrix_dim,
        random_had=random_had, seed=seed, block_size=block_size, r1_matrix=r1_matrix, r2_matrix=r2_matrix,
    )  # fmt: skip
    with bars(quiet=quiet or as_json) as progress:
        outcome = rotate_model(source, opt.target_file(out, source), config, verify=verify, progress=progress)
    notes(outcome.notes)
    print_json(render.outcome_record(outcome)) if as_json else render.outcome(outcome)


@app.command(
    epilog="Examples: quarot-onnx quantize model.onnx int8/model.onnx   |   "
    "quarot-onnx quantize model.onnx static/model.onnx --scheme w8a8-static --calib-text train.txt --tokenizer model/"
)
def quantize(
    model: opt.Model,
    out: opt.Target,
    scheme: Annotated[
        opt.Scheme | None, typer.Option(help="Default: w8a8-dynamic (per token).", rich_help_panel=opt.SCHEME)
    ] = None,
    per_channel: Annotated[
        bool | None,
        typer.Option(
            "--per-channel/--per-tensor", help="Scales of a weight. Default: per channel.", rich_help_panel=opt.SCHEME
        ),
    ] = None,
    a_sym: Annotated[
        bool | None,
        typer.Option("--a-sym/--a-asym", help="Static activations. Default: asymmetric.", rich_help_panel=opt.SCHEME),
    ] = None,
    w_sym: Annotated[
        bool | None, typer.Option("--w-sym/--w-asym", help="Weights. Default: symmetric.", rich_help_panel=opt.SCHEME)
    ] = None,
    lm_head: Annotated[
        opt.Precision | None,
        typer.Option(help="Default: int8 for w8a8-dynamic, else float.", rich_help_panel=opt.SCHEME),
    ] = None,
    embedding: Annotated[opt.Precision | None, typer.Option(help="Default: float.", rich_help_panel=opt.SCHEME)] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NODE", help="A node, or a pattern, to leave in float; may be repeated.", rich_help_panel=opt.SCHEME
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A QConfig as JSON or YAML, in place of the scheme's options.",
            rich_help_panel=opt.SCHEME,
        ),
    ] = None,
    calib_method: Annotated[
        opt.CalibrationChoice | None, typer.Option(help="Default: minmax.", rich_help_panel=opt.CALIBRATION)
    ] = None,
    percentile: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="For --calib-method percentile. Default: 99.999.", rich_help_panel=opt.CALIBRATION
        ),
    ] = None,
    calib_text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="UTF-8 text. Default: Python's own documentation.", rich_help_panel=opt.CALIBRATION
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A folder or a tokenizer.json. Default: beside the model.",
            rich_help_panel=opt.CALIBRATION,
        ),
    ] = None,
    calib_samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Windows of text.", rich_help_panel=opt.CALIBRATION)
    ] = 16,
    calib_seq_len: Annotated[
        int,
        typer.Option(metavar="L", min=2, help="Tokens of a window, BOS among them.", rich_help_panel=opt.CALIBRATION),
    ] = 512,
    no_rotate: Annotated[
        bool, typer.Option("--no-rotate", help="Quantize without rotating.", rich_help_panel=opt.ROTATION)
    ] = False,
    r1: opt.R1 = None,
    r2: opt.R2 = None,
    r3: opt.R3 = None,
    r4: opt.R4 = None,
    rotation_config: opt.RotationFile = None,
    r_matrix_dim: opt.RMatrixDim = None,
    random_had: opt.RandomHad = False,
    seed: opt.Seed = 0,
    block_size: opt.BlockSize = None,
    verify: opt.Verify = True,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Rotate as the scheme needs (R1+R2; R4 with quantized activations), prove it, and quantize to 8 bits."""
    source = opt.model_file(model)
    from quarot_onnx.cli.quantizing import Request  # noqa: PLC0415

    request = Request(
        source=source, out=out, scheme=scheme, per_channel=per_channel, a_sym=a_sym, w_sym=w_sym,
        lm_head=lm_head, embedding=embedding, exclude=tuple(exclude or ()), config=config, calib_method=calib_method,
        percentile=percentile, calib_text=calib_text, tokenizer=tokenizer, calib_samples=calib_samples,
        calib_seq_len=calib_seq_len, no_rotate=no_rotate, r1=r1, r2=r2, r3=r3, r4=r4, rotation_config=rotation_config,
        r_matrix_dim=r_matrix_dim, random_had=random_had, seed=seed, block_size=block_size,
    )  # fmt: skip
    with bars(quiet=quiet or as_json) as progress:
        outcome = request.run(verify=verify, progress=progress)
    notes(outcome.notes)
    print_json(render.outcome_record(outcome)) if as_json else render.outcome(outcome)


@app.command(epilog="Example: quarot-onnx verify model.onnx rotated/model.onnx")
def verify(
    model_a: Annotated[Path, typer.Argument(metavar="MODEL_A", help="The original.")],
    model_b: Annotated[Path, typer.Argument(metavar="MODEL_B", help="The model to check.")],
    tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of random ids, and as many of real text.")
    ] = 128,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="Seed of the random ids.")] = 0,
    as_json: opt.Json = False,
) -> None:
    """Prove that two float models compute the same; exit status 1 if they do not."""
    first, second = opt.model_file(model_a), opt.model_file(model_b)
    from quarot_onnx.evaluation.equivalence import compare, require  # noqa: PLC0415
    from quarot_onnx.evaluation.report import equivalence_record  # noqa: PLC0415

    result = compare(first, second, random_tokens=tokens, real_tokens=tokens, seed=seed)
    content = equivalence_record(result)
    print_json(content) if as_json else render.equivalence(content)
    require(result)


@app.command(epilog="Example: quarot-onnx evaluate model.onnx --text wiki.test.raw --tokenizer model/")
def evaluate(
    model: opt.Model,
    text: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text.")],
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A folder or a tokenizer.json. Default: beside the model.")
    ] = None,
    seq_len: Annotated[int, typer.Option(metavar="L", min=2, help="Tokens of a window, BOS among them.")] = 512,
    windows: Annotated[int, typer.Option(metavar="N", min=0, help="Windows; 0 for the whole text.")] = 20,
    threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="onnxruntime's threads.")] = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Perplexity of a model, float or quantized, on a text."""
    path = opt.model_file(model)
    source = opt.tokenizer_path(tokenizer, path)
    from quarot_onnx.evaluation.perplexity import perplexity  # noqa: PLC0415
    from quarot_onnx.evaluation.report import perplexity_record  # noqa: PLC0415

    with bars(quiet=quiet or as_json) as progress:
        result = perplexity(
            path, text, source, seq_len=seq_len, windows=windows, threads=threads,
            progress=lambda done, total: progress("evaluate", done, total),
        )  # fmt: skip
    content = perplexity_record(result) | {"model": str(path), "text": str(text)}
    print_json(content) if as_json else render.perplexity(content)


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
