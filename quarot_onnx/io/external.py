"""Where a model's bytes are: the ``.onnx`` file itself, its external data files, and whether all of them are there.

Everything is checked when the model is opened, by sizes alone, so that nothing fails half-way through a long run.
External tensors are bound to the absolute path of their data file: onnx-ir then follows symbolic links (the layout of
the Hugging Face hub cache), which it refuses for relative ones. A location that is absolute or climbs out of the
model's folder is refused here instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PureWindowsPath

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from quarot_onnx.errors import ModelError, did_you_mean
from quarot_onnx.io import wire
from quarot_onnx.io.links import refuse_broken

_LFS_SIGNATURE = b"version https://git-lfs"
_TENSOR = onnx.AttributeProto.TENSOR


def model_file(path: str | Path) -> Path:
    """The absolute path of an existing model file; symbolic links are kept, the files beside them matter.

    Raises:
        ModelError: If there is no such file, or it is a folder; the message names what is there instead.
    """
    path = Path(path).absolute()
    if path.is_dir():
        found = sorted([*path.glob("*.onnx"), *path.glob("onnx/*.onnx")])
        chosen = [file for file in found if file.name == "model.onnx"] or found
        if not found:
            raise ModelError(f"{path} is a folder without an .onnx file; pass the path of a model file")
        if len(chosen) == 1:
            raise ModelError(f"{path} is a folder; pass the model file {chosen[0]}")
        names = ", ".join(str(file.relative_to(path)) for file in found)
        raise ModelError(f"{path} is a folder with {len(found)} .onnx files ({names}); pass one of them")
    if not path.is_file():
        refuse_broken(path, ModelError)
        folder = path.parent
        if not folder.is_dir():
            raise ModelError(f"no model file {path}: the folder {folder} does not exist")
        hint = did_you_mean(path.name, (file.name for file in folder.glob("*.onnx") if file.is_file()))
        raise ModelError(f"no model file {path.name!r} in {folder}{hint}")
    return path


def damaged(path: Path, detail: str) -> ModelError:
    """The error for a file that is not a complete ONNX protobuf."""
    size = path.stat().st_size
    if _is_lfs_pointer(path):
        return ModelError(f"{path} ({size:,} bytes) is a Git LFS pointer, not the model; run `git lfs pull`")
    return ModelError(
        f"{path} ({size:,} bytes) is truncated, corrupt or not an ONNX model: {detail}; export or copy it again"
    )


def peek(path: Path) -> onnx.ModelProto | None:
    """A model file without its large weights; None where it is no readable ONNX model."""
    try:
        return onnx.ModelProto.FromString(wire.skeleton(path))
    except (OSError, wire.WireError, DecodeError, RecursionError):
        return None


def data_locations(path: Path) -> set[str]:
    """The data files that a model file names; none where it cannot be read."""
    proto = peek(path)
    tensors = [] if proto is None else [t for t in _tensors(proto) if t.data_location == onnx.TensorProto.EXTERNAL]
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


@dataclass
class Binder:
    """Checks every tensor of a ModelProto and binds the external ones to absolute paths.

    Attributes:
        source: The model file, absolute.
        sizes: Bytes of each data file met so far.
    """

    source: Path
    sizes: dict[Path, int] = field(default_factory=dict)

    def bind(self, proto: onnx.ModelProto) -> None:
        """Rewrite the external data entries of ``proto`` in place.

        Raises:
            ModelError: If data are missing, too short, misplaced, or of the wrong length for their tensor.
        """
        for tensor in _tensors(proto):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                self._bind_tensor(tensor)
            elif tensor.HasField("raw_data"):
                needed = _nbytes(tensor, self.source)
                if len(tensor.raw_data) != needed:
                    raise self._wrong_length(tensor, needed, len(tensor.raw_data))

    def _bind_tensor(self, tensor: onnx.TensorProto) -> None:
        needed = _nbytes(tensor, self.source)
        entries = {entry.key: entry.value for entry in tensor.external_data}
        try:
            # Without a length, or with 0, the tensor has what its shape asks for (so does onnxruntime read it).
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0)) or needed
        except ValueError as error:
            raise ModelError(
                f"tensor {tensor.name!r} in {self.source} has no valid external data range: {error}"
            ) from error
        path = self._data_file(entries.get("location", ""), tensor.name)
        if length != needed:
            raise self._wrong_length(tensor, needed, length)
        available = self.sizes[path] - offset
        if offset < 0 or available < needed:
            hint = "it is a Git LFS pointer, run `git lfs pull`" if _is_lfs_pointer(path) else "copy it again"
            raise ModelError(
                f"data file {path} is too short: tensor {tensor.name!r} needs {needed:,} bytes at offset {offset:,}, "
                f"{max(available, 0):,} are there; {hint}"
            )
        location = str(path)
        if not location.isprintable() and (shown := location.encode(errors="backslashreplace").decode()) != location:
            raise ModelError(
                f"the path {shown} is not UTF-8, as ONNX needs it; rename the folder or the file, or set PYTHONUTF8=1"
            )
        del tensor.external_data[:]
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)

    def _wrong_length(self, tensor: onnx.TensorProto, needed: int, actual: int) -> ModelError:
        shape = list(tensor.dims)
        return ModelError(
            f"tensor {tensor.name!r} in {self.source}: shape {shape} needs {needed:,} bytes, the file has {actual:,}; "
            "export the model again"
        )

    def _data_file(self, location: str, tensor: str) -> Path:
        """The existing data file, beside the model file or beside the file that a linked model points to."""
        if not location:
            raise ModelError(
                f"tensor {tensor!r} in {self.source} is external but names no data file; export the model again"
            )
        if (
            PurePath(location).is_absolute()
            or PureWindowsPath(location).is_absolute()
            or ".." in PurePath(location).parts
        ):
            raise ModelError(
                f"tensor {tensor!r} in {self.source} has its data outside the model folder ({location!r}); "
                "move the data file beside the model and use its plain name"
            )
        folders = list(dict.fromkeys([self.source.parent, self.source.resolve().parent]))
        for folder in folders:
            path = folder / location
            if path in self.sizes:
                return path
            if path.is_file():
                self.sizes[path] = path.stat().st_size
                return path
        for folder in folders:
            refuse_broken(folder / location, ModelError)
        places = " and ".join(map(str, folders))
        raise ModelError(
            f"data file {location!r} of {self.source} (tensor {tensor!r}) is missing; looked in {places}: put it there"
        )


def _nbytes(tensor: onnx.TensorProto, source: Path) -> int:
    """The bytes that the shape and type of a tensor call for."""
    size = 1
    for dim in tensor.dims:
        size *= dim
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError) as error:
        raise ModelError(f"tensor {tensor.name!r} in {source} has no raw data type: {error}") from error
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"tensor {tensor.name!r} in {source} has the impossible shape {list(tensor.dims)}")
    return (size * bits + 7) // 8


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers and attributes, in subgraphs and functions too."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: list[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == _TENSOR:
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _graph_tensors(attribute.g)
            for graph in attribute.graphs:
                yield from _graph_tensors(graph)


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS_SIGNATURE)) == _LFS_SIGNATURE
