"""The options of ``quantize`` that say what is calibrated on, and how; None where nothing was typed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from quarot_onnx.cli import options as opt
from quarot_onnx.cli.options import CALIBRATION, Key
from quarot_onnx.config.enums import CalibMethod


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Calibration."""

    calib_method: Annotated[
        CalibMethod | None,
        Option(
            metavar="METHOD",
            parser=CalibMethod.parse,
            help="minmax, percentile, mse, entropy, or auto, by the Linears' error: for fixed scales. Default: minmax.",
            rich_help_panel=CALIBRATION,
        ),
        Key("activations.calibration_method"),
    ] = None
    percentile: Annotated[
        float | None,
        Option(metavar="P", help="For --calib-method percentile. Default: 99.999.", rich_help_panel=CALIBRATION),
        Key("activations.percentile"),
    ] = None
    bias_correction: Annotated[
        bool,
        Option(
            "--bias-correction",
            help="Add the mean error of each output to the bias, for fixed scales. Default: not.",
            rich_help_panel=CALIBRATION,
        ),
        Key("activations.bias_correction"),
    ] = False
    calib_text: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="UTF-8 text, or JSON lines. Default: what the model writes (--calib-own), or Python's documentation.",
            rich_help_panel=CALIBRATION,
        ),
        Key("calibration.text"),
    ] = None
    tokenizer: Annotated[
        Path | None,
        Option(
            metavar="PATH", help="A folder or a tokenizer.json. Default: beside the model.", rich_help_panel=CALIBRATION
        ),
        Key("calibration.tokenizer"),
    ] = None
    calib_samples: Annotated[
        int | None,
        Option(metavar="N", min=1, help="Windows of the text. Default: 16.", rich_help_panel=CALIBRATION),
        Key("calibration.samples"),
    ] = None
    nsamples: Annotated[
        int | None,
        Option(metavar="N", min=1, help="The same as --calib-samples.", rich_help_panel=CALIBRATION),
        Key("calibration.samples"),
    ] = None
    calib_spread: Annotated[
        bool | None,
        Option(
            "--calib-spread/--no-calib-spread",
            help="Windows from all over the text, each from a part of its own, or one after the other from its start. "
            "Default: from all over it, unless a part holds less than a window.",
            rich_help_panel=CALIBRATION,
        ),
        Key("calibration.spread"),
    ] = None
    calib_own: Annotated[
        int | None,
        Option(
            metavar="N",
            min=0,
            help="Windows that the model writes itself, beside those of a text that is named. Default with GPTQ, GPTAQ "
            "or Qronos: as many as --calib-samples, 16 at most beside a text; else none.",
            rich_help_panel=CALIBRATION,
        ),
        Key("calibration.own"),
    ] = None
    calib_seq_len: Annotated[
        int | None,
        Option(
            metavar="L",
            min=2,
            help="Tokens of a window, BOS among them. Default: 512, or as many as the model has positions for.",
            rich_help_panel=CALIBRATION,
        ),
        Key("calibration.seq_len"),
    ] = None
    calib_decode_steps: Annotated[
        int | None,
        Option(
            metavar="N",
            min=0,
            help="Tokens of a window that are decoded one by one, for fixed scales. Default: 4 where there is a cache.",
            rich_help_panel=CALIBRATION,
        ),
        Key("calibration.decode_steps"),
    ] = None
    text_key: opt.CalibTextKey = None
    bos: opt.CalibBos = None
    bos_id: opt.CalibBosId = None
