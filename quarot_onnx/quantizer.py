"""ModelQuantizer: the pipeline behind AMD Quark's names."""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from quarot_onnx.calibration.given import FeedsSource
from quarot_onnx.calibration.readers import DataReader
from quarot_onnx.config import QConfig
from quarot_onnx.config.choices import PrefixForm
from quarot_onnx.errors import ConfigError, ModelError, OutputError
from quarot_onnx.evaluation.check import Check
from quarot_onnx.io import model_io
from quarot_onnx.kvcache import scale_file
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.pipeline import Outcome, quantize

if TYPE_CHECKING:
    import distributed
    import onnx

_LOG = logging.getLogger("quarot_onnx")


class ModelQuantizer:
    """Rotates and quantizes ONNX models as one configuration says.

    Attributes:
        config: The configuration.
        outcome: What the last ``quantize_model`` did: files, recipe, proof, times; None before the first, and
            where it failed.
    """

    def __init__(self, config: QConfig) -> None:
        """Keep the configuration.

        Raises:
            ConfigError: Something other than a QConfig was given.
        """
        if not isinstance(config, QConfig):
            raise ConfigError(
                f"ModelQuantizer takes a QConfig, not {type(config).__name__}; build one with QConfig(...)"
            )
        self.config = config
        self.outcome: Outcome | None = None

    def quantize_model(
        self,
        model_input: "str | Path | onnx.ModelProto",
        model_output: str | Path | None = None,
        calibration_data_reader: DataReader | None = None,
        *,
        verify: bool = True,
        feeds: FeedsSource | None = None,
        check: Check | None = Check(),  # noqa: B008 - frozen
        fix_shapes: Mapping[str, int] | None = None,
        overwrite: bool | None = None,
        memory: Memory = Memory(),  # noqa: B008 - frozen
        scheduler: "str | distributed.Client | None" = None,
    ) -> "onnx.ModelProto | None":
        """Rotate and quantize one model.

        Args:
            model_input: The .onnx file, or a model in memory.
            model_output: The .onnx file to write; None to get the result back as a ModelProto.
            calibration_data_reader: Any onnxruntime CalibrationDataReader; needed for static activation quantization.
            verify: Prove that the rotated model, before it is quantized, computes the same.
            feeds: Inputs to prove it on, for graphs that no rule can feed: an .npz file, a folder of them, or arrays.
            check: Compare the quantized model with the original, see `Check`; None goes without. What came of it is in
                ``outcome.fidelity``.
            fix_shapes: Free lengths of the graph that the output fixes, by name: ``{"batch_size": 1}``.
            overwrite: Whether existing files may be replaced; None: ``model_output``, and what an earlier run to it
                wrote beside it.
            memory: What the run may take, and whether models are run piece by piece for that.
            scheduler: A Dask scheduler's address, or a client of it, whose workers take calibration samples through the
                model, with the same result; see docs/scale.md.

        Returns:
            The quantized model when ``model_output`` is None, else None.

        Raises:
            InputError: The model, the configuration, the calibration data or the target is at fault.
            VerificationError: The rotated model does not compute the same, or the quantized one breaks a limit of the
                check; nothing is written.
        """
        self.outcome = None
        if not isinstance(model_output, str | Path | None):
            raise OutputError(f"model_output is a {type(model_output).__name__}; pass a path, or None for a ModelProto")
        prefix = self.config.prefix
        if model_output is None and prefix is not None and prefix.form is PrefixForm.NPZ:
            raise ConfigError(
                f"{prefix.name}: form=npz is a file beside the model, and without model_output there is none: name a "
                "file to write, or keep the prefix in the graph (form='graph')"
            )
        if not isinstance(check, Check | None):
            raise ConfigError(f"check is a {type(check).__name__}; pass a Check, or None to go without one")
        if not isinstance(memory, Memory):
            raise ConfigError(f"memory is a {type(memory).__name__}; pass a Memory")
        with tempfile.TemporaryDirectory(prefix="quarot-") as name:
            scratch = Path(name)
            source = _as_file(model_input, scratch)
            target = scratch / "quantized" / "model.onnx" if model_output is None else Path(model_output)
            self.outcome = quantize(
                source,
                target,
                self.config,
                calibration_data_reader,
                verify=verify,
                feeds=feeds,
                check=check,
                fix_shapes=fix_shapes,
                overwrite=overwrite,
                memory=memory,
                scheduler=scheduler,
            )
            for note in self.outcome.notes:
                _LOG.warning(note)
            if model_output is None and target.with_name(scale_file.file_name(target)).exists():
                _LOG.warning("without model_output the file of scales is not kept; the graph has them, too")
            return _read_back(target) if model_output is None else None


def _as_file(model: "str | Path | onnx.ModelProto", scratch: Path) -> Path:
    """The model's file; a model in memory is written to the scratch folder first."""
    if isinstance(model, str | Path):
        return Path(model)
    try:
        loaded = ir.from_proto(model)
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise ModelError(f"model_input is a {type(model).__name__}; pass a path or a ModelProto") from error
    if not isinstance(loaded, ir.Model):
        raise ModelError(f"model_input is a {type(model).__name__}; pass a path or a ModelProto")
    if next(iter(loaded.graph), None) is None:
        raise ModelError("model_input is a ModelProto without nodes; pass a path or a whole model")
    for name, value in loaded.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            raise ModelError(
                f"model_input's weight {name!r} is in the file {value.const_value.location!r}; "
                "pass the model's path, or load its weights too"
            )
    return model_io.save(loaded, scratch / "input" / "model.onnx").path


def _read_back(path: Path) -> "onnx.ModelProto":
    """A model with all its weights in memory."""
    import onnx  # noqa: PLC0415 - only for callers who want a ModelProto

    return onnx.load(str(path))
