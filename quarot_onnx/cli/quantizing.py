"""The ``quantize`` command's options, put together into one call of the pipeline."""

from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from quarot_onnx import model_io
from quarot_onnx.calibration.readers import DataReader, TextReader
from quarot_onnx.cli import configs
from quarot_onnx.cli import options as opt
from quarot_onnx.errors import ConfigError
from quarot_onnx.pipeline import Outcome, Progress, quantize
from quarot_onnx.provenance import is_rotated, recorded, summary
from quarot_onnx.quantization import static_qdq
from quarot_onnx.quantization.config import QConfig
from quarot_onnx.quantization.config.algorithm import QuarotConfig
from quarot_onnx.quantization.select import select
from quarot_onnx.sites.detect import detect

_WITH_CONFIG = ("scheme", "per_channel", "a_sym", "w_sym", "lm_head", "embedding", "calib_method", "percentile")
_ROTATION = ("r1", "r2", "r3", "r4", "rotation_config", "r_matrix_dim", "block_size")


@dataclass(frozen=True)
class Request:
    """What was typed; None where nothing was."""

    source: Path
    out: Path
    scheme: opt.Scheme | None
    per_channel: bool | None
    a_sym: bool | None
    w_sym: bool | None
    lm_head: opt.Precision | None
    embedding: opt.Precision | None
    exclude: tuple[str, ...]
    config: Path | None
    calib_method: opt.CalibrationChoice | None
    percentile: float | None
    calib_text: Path | None
    tokenizer: Path | None
    calib_samples: int
    calib_seq_len: int
    no_rotate: bool
    r1: bool | None
    r2: bool | None
    r3: bool | None
    r4: bool | None
    rotation_config: Path | None
    r_matrix_dim: int | None
    random_had: bool
    seed: int
    block_size: int | None

    def run(self, *, verify: bool, progress: Progress) -> Outcome:
        """Quantize.

        Raises:
            QuarotError: See ``pipeline.quantize``; ConfigError also for options that contradict each other.
        """
        model = model_io.load(self.source)
        target = opt.target_file(self.out, self.source)
        model_io.check_target(model, target)
        recipe = recorded(model)
        config = self._config(model, rotated=is_rotated(recipe))
        calibrated = static_qdq.needs_calibration(select(model, config))
        reader = self._reader() if calibrated else None
        outcome = quantize(self.source, target, config, reader, verify=verify, progress=progress)
        notes = [*outcome.notes]
        if is_rotated(recipe) and config.quarot is None and recipe is not None:
            notes.append(f"the model is already rotated ({summary(recipe)}): quantized as it is")
        unused = [name for name in ("calib_text", "tokenizer") if getattr(self, name) is not None]
        if not calibrated and unused:
            options = " and ".join("--" + name.replace("_", "-") for name in unused)
            notes.append(f"nothing is calibrated: {options} not used")
        return replace(outcome, notes=tuple(notes))

    def _config(self, model: ir.Model, *, rotated: bool) -> QConfig:
        """The configuration from the file, or from the options."""
        if self.config is not None:
            given = [name for name in _WITH_CONFIG if getattr(self, name) is not None]
            given += [name for name in _ROTATION if getattr(self, name) is not None]
            given += [name for name in ("exclude", "no_rotate", "random_had") if getattr(self, name)]
            if given:
                option = "--" + given[0].replace("_", "-")
                raise ConfigError(f"{option} and --config say the same thing twice; write it into {self.config}")
            return QConfig.load(self.config)
        scheme = self.scheme or opt.Scheme.W8A8_DYNAMIC
        head = self.lm_head or (opt.Precision.INT8 if scheme is opt.Scheme.W8A8_DYNAMIC else opt.Precision.FLOAT)
        if self.calib_method is not None and scheme is not opt.Scheme.W8A8_STATIC:
            raise ConfigError(f"--calib-method: the scheme {scheme} is not calibrated; use --scheme w8a8-static")
        return configs.scheme_config(
            scheme,
            per_channel=self.per_channel is not False,
            activation_symmetric=self.a_sym,
            weight_symmetric=self.w_sym is not False,
            method=self.calib_method or opt.CalibrationChoice.MINMAX,
            percentile=self.percentile,
            head=_head_names(model) if head is opt.Precision.FLOAT else (),
            embedding=self.embedding or opt.Precision.FLOAT,
            exclude=self.exclude,
            rotation=None if self._unrotated(rotated=rotated) else self._rotation(),
        )

    def _unrotated(self, *, rotated: bool) -> bool:
        """No rotation was asked for, or the model brings its own."""
        typed = [name for name in _ROTATION if getattr(self, name) is not None]
        typed += ["random_had"] if self.random_had else []
        if not self.no_rotate:
            return rotated and not typed
        switched_on = [name for name in typed if getattr(self, name) is not False]
        if switched_on:
            option = "--" + switched_on[0].replace("_", "-")
            raise ConfigError(f"{option} contradicts --no-rotate; leave out one of them")
        return True

    def _rotation(self) -> QuarotConfig:
        return configs.quarot_config(
            r1=self.r1,
            r2=self.r2,
            r3=self.r3,
            r4=self.r4,
            rotation_config=self.rotation_config,
            r_matrix_dim=self.r_matrix_dim,
            random_had=self.random_had,
            seed=self.seed,
            block_size=self.block_size,
        )

    def _reader(self) -> DataReader:
        """A reader of text."""
        tokenizer = opt.tokenizer_path(self.tokenizer, self.source)
        return TextReader(
            self.source, self.calib_text, tokenizer, samples=self.calib_samples, seq_len=self.calib_seq_len
        )


def _head_names(model: ir.Model) -> list[str]:
    """The language model head, found by structure."""
    return [linear.name for linear in detect(model).head]
