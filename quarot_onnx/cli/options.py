"""Options that several commands share, and how they become configurations."""

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from quarot_onnx.errors import ConfigError, ModelError
from quarot_onnx.quantization.config import QConfig
from quarot_onnx.quantization.config.algorithm import QuarotConfig
from quarot_onnx.quantization.config.enums import CalibMethod, QuantGranularity
from quarot_onnx.quantization.config.spec import Int8Spec, QLayerConfig, QTensorConfig, UInt8Spec

ROTATION, CALIBRATION, SCHEME = "Rotation", "Calibration data", "Scheme"


class Scheme(StrEnum):
    """What is quantized to 8 bits, and how."""

    W8A8_DYNAMIC = "w8a8-dynamic"
    W8A8_STATIC = "w8a8-static"
    W8 = "w8"


class CalibrationChoice(StrEnum):
    """How activation ranges are found."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"


class Precision(StrEnum):
    """How the head or the embedding is stored."""

    FLOAT = "float"
    INT8 = "int8"


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The .onnx file, or a folder with one.")]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="The .onnx file to write, or a folder for it.")]
R1 = Annotated[bool | None, typer.Option("--r1/--no-r1", help="Residual stream (offline).", rich_help_panel=ROTATION)]
R2 = Annotated[
    bool | None, typer.Option("--r2/--no-r2", help="Values of each head (offline).", rich_help_panel=ROTATION)
]
R3 = Annotated[
    bool | None, typer.Option("--r3/--no-r3", help="Queries and keys after RoPE (online).", rich_help_panel=ROTATION)
]
R4 = Annotated[bool | None, typer.Option("--r4/--no-r4", help="Input of down_proj (online).", rich_help_panel=ROTATION)]
RotationFile = Annotated[
    Path | None,
    typer.Option(
        "--rotation-config",
        metavar="FILE",
        help="rotation_config.json; without it the graph is searched.",
        rich_help_panel=ROTATION,
    ),
]
RMatrixDim = Annotated[
    int | None,
    typer.Option("--r-matrix-dim", metavar="N", help="R1's size, checked against the graph.", rich_help_panel=ROTATION),
]
RandomHad = Annotated[
    bool, typer.Option("--random-had", help="Randomised Hadamards for R1 and R2.", rich_help_panel=ROTATION)
]
Seed = Annotated[int, typer.Option("--seed", metavar="S", help="Seed of the random signs.", rich_help_panel=ROTATION)]
BlockSize = Annotated[
    int | None, typer.Option("--block-size", metavar="B", help="Block-diagonal R1 and R4.", rich_help_panel=ROTATION)
]
R1Matrix = Annotated[
    Path | None,
    typer.Option("--r1-matrix", metavar="NPY", help="An orthogonal matrix for R1.", rich_help_panel=ROTATION),
]
R2Matrix = Annotated[
    Path | None,
    typer.Option("--r2-matrix", metavar="NPY", help="An orthogonal matrix for R2.", rich_help_panel=ROTATION),
]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Prove that the rotation changed nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def model_file(path: Path) -> Path:
    """The .onnx file that a path names: itself, or the one in a folder.

    Raises:
        ModelError: The folder holds none, or several and no model.onnx.
    """
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
    """The file to write: ``out`` itself, or a file of the source's name in the folder ``out``."""
    return out if out.suffix == ".onnx" and not out.is_dir() else out / source.name


def quarot_config(
    *,
    r1: bool | None,
    r2: bool | None,
    r3: bool | None,
    r4: bool | None,
    rotation_config: Path | None,
    r_matrix_dim: int | None,
    random_had: bool,
    seed: int,
    block_size: int | None = None,
    r1_matrix: Path | None = None,
    r2_matrix: Path | None = None,
) -> QuarotConfig:
    """The rotation options as a configuration."""
    return QuarotConfig(
        r_matrix_dim=r_matrix_dim,
        use_random_had=random_had,
        r_config_path=rotation_config,
        r1=r1,
        r2=r2,
        r3=r3,
        r4=r4,
        seed=seed,
        block_size=block_size,
        r1_matrix_path=r1_matrix,
        r2_matrix_path=r2_matrix,
    )


def scheme_config(
    scheme: Scheme,
    *,
    per_channel: bool,
    activation_symmetric: bool | None,
    weight_symmetric: bool,
    method: CalibrationChoice,
    percentile: float | None,
    head: Iterable[str],
    embedding: Precision,
    exclude: Iterable[str],
    rotation: QuarotConfig | None,
) -> QConfig:
    """The scheme options as a configuration.

    Raises:
        ConfigError: Options that contradict each other.
    """
    granularity = QuantGranularity.Channel if per_channel else QuantGranularity.Tensor
    weight = Int8Spec(symmetric=weight_symmetric, quant_granularity=granularity)
    activation: QTensorConfig | None = None
    if scheme is Scheme.W8A8_DYNAMIC:
        if activation_symmetric is False:
            raise ConfigError("--a-asym: per-token activations are symmetric; use --scheme w8a8-static or leave it out")
        activation = UInt8Spec(symmetric=True, quant_granularity=QuantGranularity.Token)
    elif scheme is Scheme.W8A8_STATIC:
        activation = UInt8Spec(symmetric=bool(activation_symmetric), calibration_method=CalibMethod.parse(str(method)))
        if percentile is not None:
            activation = activation.model_copy(update={"percentile": percentile})
    elif activation_symmetric is not None:
        raise ConfigError("--a-sym/--a-asym: the scheme w8 leaves activations in float; leave it out")
    if percentile is not None and (scheme is not Scheme.W8A8_STATIC or method is not CalibrationChoice.PERCENTILE):
        raise ConfigError("--percentile needs --scheme w8a8-static and --calib-method percentile")
    types = ["MatMul", "Gemm"]
    layer_types: dict[QLayerConfig, list[str]] = {}
    if embedding is Precision.INT8:
        types.append("Gather")
        layer_types = {QLayerConfig(weight=Int8Spec(quant_granularity=QuantGranularity.Channel)): ["Gather"]}
    return QConfig(
        QLayerConfig(activation=activation, weight=weight),
        layer_type_config=layer_types,
        exclude=[*head, *exclude],
        algo_config=[] if rotation is None else [rotation],
        OpTypesToQuantize=types,
    )
