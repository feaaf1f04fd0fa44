"""Options that several commands share, and the files that they name. Nothing heavy is imported here."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from quarot_onnx.errors import CalibrationError, ConfigError, ModelError, OutputError, did_you_mean
from quarot_onnx.io.links import refuse_broken

MOST_TOKENS = (1 << 31) - 1
"""More than this are asked for by mistake."""

ROTATION, CALIBRATION, SCHEME, WEIGHTS, ROUNDING, ACTIVATIONS, CACHE, CHECK = (
    "Rotation",
    "Calibration data",
    "Scheme",
    "Weights",
    "Rounding with gptq, gptaq, qronos",
    "Activations",
    "Key/value cache",
    "Check of the quantized model",
)
"""The panels of the help. Names of options share a column within one: long ones need a panel without switches."""

_OTHER_FILES = frozenset(
    {
        ".bin",
        ".ckpt",
        ".data",
        ".gguf",
        ".json",
        ".npy",
        ".npz",
        ".onnx_data",
        ".ort",
        ".pb",
        ".pt",
        ".pth",
        ".safetensors",
        ".tflite",
        ".txt",
        ".yaml",
        ".yml",
        ".zip",
    }
)
"""Suffixes of files that are plainly something else; any other may be a part of a folder's name, as in ``v1.7``."""


@dataclass(frozen=True)
class Key:
    """The key of a recipe that an option sets; stands beside the option's own declaration."""

    name: str


class Dtype(StrEnum):
    """The type of an export's weights."""

    FP32 = "fp32"
    FP16 = "fp16"


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The .onnx file, or a folder with one.")]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="The .onnx file to write, or a folder for it.")]
R1 = Annotated[
    bool | None,
    typer.Option("--r1/--no-r1", help="Residual stream (offline).", rich_help_panel=ROTATION),
    Key("rotation.r1"),
]
R2 = Annotated[
    bool | None,
    typer.Option("--r2/--no-r2", help="Values of each head (offline).", rich_help_panel=ROTATION),
    Key("rotation.r2"),
]
R3 = Annotated[
    bool | None,
    typer.Option("--r3/--no-r3", help="Queries and keys after RoPE (online).", rich_help_panel=ROTATION),
    Key("rotation.r3"),
]
R4 = Annotated[
    bool | None,
    typer.Option("--r4/--no-r4", help="Input of down_proj (online).", rich_help_panel=ROTATION),
    Key("rotation.r4"),
]
RotationFile = Annotated[
    Path | None,
    typer.Option(
        "--rotation-config",
        metavar="FILE",
        help="rotation_config.json; without it the graph is searched.",
        rich_help_panel=ROTATION,
    ),
    Key("rotation.r_config_path"),
]
RMatrixDim = Annotated[
    int | None,
    typer.Option(
        "--r-matrix-dim", min=1, metavar="N", help="R1's size, checked against the graph.", rich_help_panel=ROTATION
    ),
    Key("rotation.r_matrix_dim"),
]
RandomHad = Annotated[
    bool,
    typer.Option("--random-had", help="Randomised Hadamards for R1 and R2.", rich_help_panel=ROTATION),
    Key("rotation.use_random_had"),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, metavar="S", help="Seed of the random signs. Default: 0.", rich_help_panel=ROTATION),
    Key("rotation.seed"),
]
BlockSize = Annotated[
    int | None,
    typer.Option("--block-size", min=1, metavar="B", help="Block-diagonal R1 and R4.", rich_help_panel=ROTATION),
    Key("rotation.block_size"),
]
R1Matrix = Annotated[
    Path | None,
    typer.Option("--r1-matrix", metavar="NPY", help="An orthogonal matrix for R1.", rich_help_panel=ROTATION),
    Key("rotation.r1_matrix_path"),
]
R2Matrix = Annotated[
    Path | None,
    typer.Option("--r2-matrix", metavar="NPY", help="An orthogonal matrix for R2.", rich_help_panel=ROTATION),
    Key("rotation.r2_matrix_path"),
]
SplitCache = Annotated[
    bool,
    typer.Option(
        "--split-cache",
        help="The graphs that share this one's cache are rotated with the same options.",
        rich_help_panel=ROTATION,
    ),
    Key("rotation.split_cache"),
]
_BOS_HELP = "Force the token in front of every window, or none. Default: as the tokenizer's files say."
_BOS_ID_HELP = "The id to put there."
TEXT_KEY_HELP = "The text is JSON lines, this its key. Default in .jsonl files: text."
UseBos = Annotated[bool | None, typer.Option("--bos/--no-bos", help=_BOS_HELP)]
BosId = Annotated[int | None, typer.Option("--bos-id", min=0, metavar="N", help=_BOS_ID_HELP)]
TextKey = Annotated[str | None, typer.Option("--text-key", metavar="KEY", help=TEXT_KEY_HELP)]
CalibBos = Annotated[
    bool | None, typer.Option("--bos/--no-bos", help=_BOS_HELP, rich_help_panel=CALIBRATION), Key("calibration.bos")
]
CalibBosId = Annotated[
    int | None,
    typer.Option("--bos-id", min=0, metavar="N", help=_BOS_ID_HELP, rich_help_panel=CALIBRATION),
    Key("calibration.bos"),
]
CalibTextKey = Annotated[
    str | None,
    typer.Option("--text-key", metavar="KEY", help=TEXT_KEY_HELP, rich_help_panel=CALIBRATION),
    Key("calibration.text_key"),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="A recipe as YAML: ours, LLMC's, or a scheme by name.")
]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Prove that the rotation changed nothing.")]
Feeds = Annotated[
    Path | None,
    typer.Option(
        "--feeds",
        metavar="NPZ",
        help="Inputs for models that no rule can feed: an .npz file of arrays by input name, or a folder of them.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace files of other origin beside OUT, and a model in a folder OUT.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Models that need more, as 8GB, are run piece by piece. Default: what the machine has available.",
    ),
]
ByStages = Annotated[
    bool | None,
    typer.Option("--by-stages/--whole", help="Run models piece by piece, or whole. Default: as memory allows."),
]
Provider = Annotated[
    str | None,
    typer.Option(
        "--provider",
        metavar="NAME",
        help="What onnxruntime runs models on here: cpu, cuda, openvino, ... Default: cpu.",
    ),
]
ProviderOption = Annotated[
    list[str] | None,
    typer.Option("--provider-option", metavar="KEY=VALUE", help="An option of the provider; may be repeated."),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="ADDRESS",
        help="A Dask scheduler (tcp://host:8786) whose workers help; the result is the same (extra distributed).",
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        "--max-kl", metavar="X", min=0, help="Exit status 1 where the KL divergence is above.", rich_help_panel=CHECK
    ),
]
MaxPplRatio = Annotated[
    float | None,
    typer.Option(
        "--max-ppl-ratio",
        metavar="R",
        min=0,
        help="Exit status 1 where the perplexity is above R times the original's.",
        rich_help_panel=CHECK,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def model_file(path: Path) -> Path:
    """The .onnx file that a path names: itself, or the one in a folder.

    Raises:
        ModelError: There is nothing, or a folder that holds no .onnx file, or several and no model.onnx.
    """
    if not path.exists():
        refuse_broken(path.absolute(), ModelError)
        beside = [file.name for file in path.parent.glob("*.onnx") if file.is_file()] if path.parent.is_dir() else []
        raise ModelError(
            f"no model at {path}{did_you_mean(path.name, beside)}; name an .onnx file or a folder with one"
        )
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.onnx"))
    if path / "model.onnx" in found:
        return path / "model.onnx"
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "no .onnx file"
        raise ModelError(f"the folder {path} holds {names}; name the .onnx file itself")
    return found[0]


def target_file(out: Path, source: Path) -> Path:
    """The file to write: ``out`` itself, or a file of the source's name in the folder ``out``.

    Raises:
        OutputError: ``out`` is named like a file of another kind, and is no folder.
    """
    if out.suffix.lower() in _OTHER_FILES and not out.is_dir():
        raise OutputError(
            f"{out} is named like a {out.suffix} file, and ONNX is written; name an .onnx file, or a folder (one of "
            "this name has to be there already)"
        )
    return out if out.suffix == ".onnx" and not out.is_dir() else out / source.name


def tokenizer_path(given: Path | None, model: Path) -> Path:
    """The tokenizer: the one that was named, or the one beside the model.

    Raises:
        CalibrationError: None was named, and there is none beside the model.
    """
    if given is not None:
        return given
    if not (model.parent / "tokenizer.json").is_file():
        raise CalibrationError(f"no tokenizer.json beside {model}; name the model's tokenizer with --tokenizer")
    return model.parent


def bos_choice(use: bool | None, token_id: int | None) -> bool | int | None:
    """What ``--bos``, ``--no-bos`` and ``--bos-id`` ask for, as a recipe's ``bos``.

    Raises:
        ConfigError: Two of them were typed.
    """
    if use is not None and token_id is not None:
        raise ConfigError(f"--bos-id {token_id} contradicts {'--bos' if use else '--no-bos'}; leave out one of them")
    return use if token_id is None else token_id
