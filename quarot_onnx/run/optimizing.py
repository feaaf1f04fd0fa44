"""onnxruntime's own optimised copy of a model: the graph as it rewrites it, the weights as its kernels read them.

Whoever opens a model pays for both each time. A copy has them done, for one kind of processor and one version of
onnxruntime; it is written here, opened as its user will open it, and compared with the model.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.leading import Lead
from quarot_onnx.calibration.roles import is_decoder
from quarot_onnx.errors import VerificationError
from quarot_onnx.evaluation.outputs import random_feeds, run
from quarot_onnx.evaluation.tolerance import TOLERANCES, weight_type
from quarot_onnx.graph.saturation import saturating_here
from quarot_onnx.io import model_io
from quarot_onnx.io.companions import GenaiSettings
from quarot_onnx.io.delivery import Delivery
from quarot_onnx.processor import described
from quarot_onnx.run.prefixing import prefix_files
from quarot_onnx.sessions import runtime
from quarot_onnx.sessions.providers import version_record

_GENAI = GenaiSettings(session_options={"graph_optimization_level": "ORT_DISABLE_ALL"})
"""What onnxruntime-genai is told: the graph is optimised already."""

_TOKENS = 16


def optimize(source: str | Path, target: str | Path, *, overwrite: bool | None = None) -> model_io.SavedModel:
    """Write onnxruntime's optimised copy of a model for this processor, with a report of which that is.

    Where 8-bit products of the model saturate on this processor, those of the copy are exact: what the session option
    ``session.x64quantprecision`` rewrites, cannot be rewritten any more when the copy is opened.

    Open it without optimisation: ``SessionOptions.graph_optimization_level = ORT_DISABLE_ALL``; the genai_config.json
    that is copied along says so to onnxruntime-genai.

    Args:
        source: The .onnx file, float or quantized.
        target: The .onnx file to write; weights go to ``<file name>.data`` beside it, packed ones among them.
        overwrite: Whether existing files may be replaced; None: the target that was named, and what an earlier run to
            it wrote beside it.

    Raises:
        InputError: The model or the target is at fault.
        VerificationError: The copy computes something else; nothing is written.
    """
    model, path = model_io.load(source), Path(target).absolute()
    folder = Path(source).absolute().parent
    inputs = model_io.input_files(model)
    delivery = Delivery.to(
        path,
        inputs=inputs,
        data=True,
        report=True,
        companions_from=folder,
        genai=_GENAI,
        beside=prefix_files(Lead.of(model, folder)),
        overwrite=overwrite,
    )
    data = delivery.outputs.data
    assert data is not None, "asked for"
    exact = saturating_here(model) > 0

    def write(model_file: Path, data_file: Path | None) -> Mapping[str, object]:
        assert data_file is not None, "as there is a place for it"
        data_file.touch()  # a model of a few numbers has none
        runtime.write_optimized(source, model_file, data_file.name, exact_products=exact)
        _require_same(source, model_file, model, folder, exact=exact)
        return {"optimized": {"from": Path(source).name, "processor": described(), **version_record()}}

    delivery.make(sum(file.stat().st_size for file in inputs), write, {})
    written = sum(file.stat().st_size for file in (path, data))
    return model_io.SavedModel(path, data, written, delivery.outputs.report)


def _require_same(source: str | Path, copy: Path, model: ir.Model, folder: Path, *, exact: bool) -> None:
    """Compare a copy, opened as it is meant to be, with its model, on random inputs."""
    feeds, tolerance = _feeds(model, folder), TOLERANCES[weight_type(model)]
    names = [str(value.name) for value in model.graph.outputs]
    wanted = run(runtime.session(source, exact_products=exact), names, feeds)
    found = run(runtime.session(copy, optimize=False), names, feeds)
    for name, a, b in zip(names, wanted, found, strict=True):
        if not np.issubdtype(a.dtype, np.floating) or not a.size:
            continue  # integers of a cache may lie a step apart
        apart = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max() / max(np.abs(a).max(), 1e-30))
        if not apart <= tolerance.max_rel:
            raise VerificationError(
                f"onnxruntime's optimised copy of {source} computes something else here: {name!r} is off by "
                f"{apart:.2e} of its largest value, more than {tolerance.max_rel:.0e}; keep to the model itself"
            )


def _feeds(model: ir.Model, folder: Path) -> Feeds:
    rng = np.random.default_rng(0)
    if not is_decoder(model):
        return random_feeds(model, 1, rng)[0]
    inputs = ModelInputs.from_model(model, folder=folder)
    length = inputs.lengths.seq or _TOKENS
    return inputs.feed(rng.integers(0, inputs.id_range, (1, length)))
