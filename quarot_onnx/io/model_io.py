"""Models in and out: opened without reading a weight, written one weight at a time.

``load`` gives an ``onnx_ir.Model`` whose weights are external tensors, into the data file or, for a single-file export,
into the ``.onnx`` file itself. A rewrite puts a ``lazy_tensor`` in a weight's place; ``save`` evaluates it when its
turn comes, so the peak is one weight. Outputs appear at once or not at all (``staging``) and never replace what the
model was read from.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from quarot_onnx.errors import ModelError, OutputError
from quarot_onnx.io import wire
from quarot_onnx.io.companions import NO_SETTINGS, GenaiSettings
from quarot_onnx.io.delivery import Delivery
from quarot_onnx.io.external import Binder, damaged, model_file
from quarot_onnx.io.layout import Layout, lay_out, streamed_weights
from quarot_onnx.io.marks import restore_marks
from quarot_onnx.io.spellings import lift_constants, name_standard_domain, respell
from quarot_onnx.io.tensors import lazy_tensor, read_array, read_rows
from quarot_onnx.progress import Progress

__all__ = [
    "SavedModel",
    "check_target",
    "input_files",
    "lazy_tensor",
    "load",
    "read_array",
    "read_rows",
    "save",
    "source_of",
]

_SOURCE = "source"
_DATA_FILES = "data_files"
_EXTERNAL_FROM = 100 * 10**6
_IR_ERRORS = (RuntimeError, ir.passes.InvariantError, ValueError, TypeError, KeyError)  # onnx-ir on a damaged graph
_PROTOBUF_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class SavedModel:
    """What ``save`` wrote.

    Attributes:
        path: The ``.onnx`` file, absolute.
        data_path: Its external data file, or None for a single file.
        bytes_total: Bytes of both.
        report_path: The JSON report, or None.
    """

    path: Path
    data_path: Path | None
    bytes_total: int
    report_path: Path | None


def load(path: str | Path) -> ir.Model:
    """Open a model without reading its weights.

    What may be spelt in several ways is spelt in one (:mod:`.spellings`): nodes are sorted, local functions inlined,
    and initializers are inputs only where they are defaults that may be overridden. Constant nodes of at least
    ``wire.INLINE_BYTES`` become initializers. Marks of online rotations that the file has lost are put back
    (:mod:`.marks`).

    Args:
        path: The ``.onnx`` file, with or without external data; symbolic links are followed.

    Returns:
        The model; ``source_of`` gives its path.

    Raises:
        ModelError: If the file or its data are missing, damaged, misplaced or empty.
    """
    source = model_file(path)
    proto = _parse(source)
    binder = Binder(source)
    binder.bind(proto)
    try:
        model = ir.serde.deserialize_model(proto)
        respell(model, source)
    except _IR_ERRORS as error:
        if "sparse" in _one_line(error).lower():  # the attribute of a Constant, which onnx-ir does not read
            raise ModelError(f"{source} has sparse constants; export it with dense weights") from error
        raise damaged(source, f"its graph is inconsistent ({_one_line(error)})") from error
    lift_constants(model)
    restore_marks(model)
    model.meta[_SOURCE] = source
    model.meta[_DATA_FILES] = tuple(binder.sizes)
    return model


def source_of(model: ir.Model) -> Path | None:
    """The absolute path of the file that a model was loaded from; None for a model made in memory."""
    source = model.meta.get(_SOURCE)
    return source if isinstance(source, Path) else None


def save(
    model: ir.Model,
    path: str | Path,
    *,
    overwrite: bool | None = None,
    use_external_data: bool | None = None,
    progress: Progress | None = None,
    companions_from: Path | None = None,
    report: Mapping[str, object] | None = None,
    forbid: Iterable[Path] = (),
    check: Callable[[Path], Mapping[str, object]] | None = None,
    genai: GenaiSettings = NO_SETTINGS,
    beside: Mapping[str, bytes] | None = None,
) -> SavedModel:
    """Write a model, one weight in memory at a time, all files at once or none.

    Args:
        model: The model; it is left as it is and stays usable.
        path: The ``.onnx`` file; missing folders are created. External data go to ``<file name>.data`` beside it.
        overwrite: Whether existing files may be replaced; None: the file that was named with its data, and what an
            earlier run to it wrote (see ``replacing``).
        use_external_data: Whether the weights get a file of their own; None: from 100 MB on.
        progress: Called after each weight with the bytes written and their total.
        companions_from: A model folder whose configs and tokenizer are copied along.
        report: Written as JSON to ``<stem>.quarot.json`` beside the model.
        forbid: Further files that must not be overwritten.
        check: Called with the complete model among its companions, before any file is at its place; it may rewrite the
            ``.onnx`` file. What it returns is added to the report; what it raises leaves everything as it was.
        genai: What onnxruntime-genai is to set, in the genai_config.json that is copied along.
        beside: Further files that go with the model, by name; what holds for its companions holds for them.

    Returns:
        What was written.

    Raises:
        OutputError: If a target is an input, may not be replaced or cannot be written, the disk is full, or a single
            file would exceed 2 GB.
    """
    target = Path(path).absolute()
    weights = streamed_weights(model).values()
    external = use_external_data
    if external is None:
        external = sum(tensor.nbytes for tensor in weights) >= _EXTERNAL_FROM
    delivery = Delivery.to(
        target,
        inputs=[*input_files(model), *forbid],
        data=external,
        report=report is not None,
        companions_from=companions_from,
        genai=genai,
        beside=beside or {},
        overwrite=overwrite,
    )
    data_path = delivery.outputs.data
    layout = lay_out(model, data_name=data_path.name if data_path else None)
    if data_path is None:
        _check_protobuf_size(layout, str(target))

    def write(model_file: Path, data_file: Path | None) -> Mapping[str, object]:
        if data_file is not None:
            layout.write_data(data_file, progress)
        layout.write_model(model_file, None if data_file else progress)
        try:
            return {} if check is None else check(model_file)
        except OSError as error:  # not of writing the model
            where = f" at {error.filename}" if error.filename else ""
            raise OutputError(f"the check of {target} failed{where}: {error.strerror or error}") from error

    delivery.make(layout.model_bytes + layout.data_bytes, write, report or {})
    return SavedModel(target, data_path, layout.model_bytes + layout.data_bytes, delivery.outputs.report)


def check_target(
    model: ir.Model,
    path: str | Path,
    *,
    overwrite: bool | None = None,
    companions_from: Path | None = None,
    genai: GenaiSettings = NO_SETTINGS,
) -> None:
    """Refuse early what ``save`` would refuse: a target that is an input, a folder, or not to be replaced.

    Args:
        model: The model that was read.
        path: The ``.onnx`` file to be written.
        overwrite: As for ``save``.
        companions_from: The model folder whose companions, and a report, will go beside the output.
        genai: As for ``save``.

    Raises:
        OutputError: Naming the target and the way out.
    """
    if not Path(path).suffix:
        raise OutputError(f"{path} is no name of an .onnx file: give one, such as {Path(path) / 'model.onnx'}")
    if not isinstance(overwrite, bool | None):
        raise OutputError(f"overwrite is {overwrite!r}: give True, False, or None for the target that was named")
    Delivery.to(
        Path(path).absolute(),
        inputs=input_files(model),
        data=True,
        report=companions_from is not None,
        companions_from=companions_from,
        genai=genai,
        overwrite=overwrite,
    )


def _parse(source: Path) -> onnx.ModelProto:
    """The model without its large weights."""
    try:
        proto = onnx.ModelProto.FromString(wire.skeleton(source))
    except (wire.WireError, DecodeError, RecursionError) as error:
        raise damaged(source, _one_line(error)) from error
    except OSError as error:
        raise ModelError(f"cannot read {source}: {error.strerror}; check its permissions") from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise damaged(source, "it has no " + ("operator set imports" if proto.HasField("graph") else "graph"))
    if not proto.graph.node:
        raise ModelError(f"the graph of {source} has no nodes; export the model again")
    name_standard_domain(proto)
    imported = {opset.domain for opset in proto.opset_import}
    if unknown := {node.domain for node in proto.graph.node} - imported - {""}:
        raise damaged(source, f"it uses operators of {sorted(unknown)} without importing them")
    if proto.graph.sparse_initializer:
        name = proto.graph.sparse_initializer[0].values.name
        raise ModelError(f"{source} has sparse initializers (such as {name!r}); export it with dense weights")
    return proto


def input_files(model: ir.Model) -> list[Path]:
    """The files that the model was read from and those its tensors are still read from."""
    source = source_of(model)
    files = [] if source is None else [source, *model.meta.get(_DATA_FILES, ())]
    tensors = streamed_weights(model).values()
    files += [Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
    return list(dict.fromkeys(files))


def _check_protobuf_size(layout: Layout, what: str) -> None:
    if layout.model_bytes > _PROTOBUF_LIMIT:
        raise OutputError(
            f"{what} would have {layout.model_bytes:,} bytes as a single file and a protobuf holds at most "
            f"{_PROTOBUF_LIMIT:,}; use external data"
        )


def _one_line(error: BaseException) -> str:
    """The first line of the innermost cause: onnx-ir wraps errors once per level of the graph."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)
