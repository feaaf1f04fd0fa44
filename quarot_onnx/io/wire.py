"""The protobuf wire format of a model file, cut open and sewn up around the weights.

A ModelProto is a tree of length-delimited fields (https://protobuf.dev/programming-guides/encoding). Parsing a file
with inline weights costs twice its size in memory; walking its length prefixes costs nothing. Two rewrites follow from
that walk, each the other's inverse:

- ``skeleton``: the model file without its large ``raw_data``, each replaced by external data that points into the file
  itself;
- ``inline_pieces``: a model whose initializers are external, as pieces to be written one after the other, with a
  ``Payload`` where a tensor's bytes belong.

Field numbers are those of onnx.proto3.
"""

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

import onnx

INLINE_BYTES = 1024
"""Tensors below this many bytes stay inside the protobuf."""

_VARINT, _DELIMITED = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}
_TENSOR_RAW_DATA = 9
_MODEL_OPSET_IMPORT, _OPSET_DOMAIN = 8, 1
_MAX_VARINT_BYTES = 10

Buffer = bytes | mmap.mmap


class WireError(ValueError):
    """The bytes are not a complete protobuf message."""


class Field(NamedTuple):
    """One field of a message: ``[start, payload)`` is its tag and length, ``[payload, stop)`` its value."""

    number: int
    kind: int
    start: int
    payload: int
    stop: int


@dataclass(frozen=True)
class Payload:
    """A gap of ``nbytes`` bytes for tensor number ``index``."""

    index: int
    nbytes: int


Piece = bytes | Payload
_Edit = Callable[[Buffer, int, int], list[Piece] | None]


class _Message(Enum):
    MODEL = auto()
    GRAPH = auto()
    FUNCTION = auto()
    NODE = auto()
    ATTRIBUTE = auto()
    TENSOR = auto()


_Tree = dict[_Message, dict[int, _Message]]

_ALL_TENSORS: _Tree = {
    _Message.MODEL: {7: _Message.GRAPH, 25: _Message.FUNCTION},
    _Message.GRAPH: {1: _Message.NODE, 5: _Message.TENSOR},
    _Message.FUNCTION: {7: _Message.NODE},
    _Message.NODE: {5: _Message.ATTRIBUTE},
    _Message.ATTRIBUTE: {5: _Message.TENSOR, 6: _Message.GRAPH, 10: _Message.TENSOR, 11: _Message.GRAPH},
}
_ROOT_INITIALIZERS: _Tree = {
    _Message.MODEL: {7: _Message.GRAPH},
    _Message.GRAPH: {5: _Message.TENSOR},
}


def skeleton(path: Path) -> bytes:
    """The serialized model of a file without its large inline tensors.

    Every ``raw_data`` of at least ``INLINE_BYTES`` becomes external data whose location is the file's own name.

    Args:
        path: The model file.

    Returns:
        A serialized ModelProto, a few megabytes at most unless tensors use typed fields such as ``float_data``.

    Raises:
        WireError: If the file ends inside a field or is no protobuf.
        OSError: If it cannot be read.
    """

    def externalize(data: Buffer, start: int, stop: int) -> list[Piece] | None:
        return _external_pieces(data, start, stop, location=path.name)

    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            raise WireError("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            pieces = _Rewriter(data, _ALL_TENSORS, externalize, min_bytes=INLINE_BYTES).run()
    return b"".join(piece for piece in pieces if isinstance(piece, bytes))


def inline_pieces(model: bytes) -> list[Piece]:
    """The pieces of the same model with the external initializers of its main graph inside.

    Args:
        model: A serialized ModelProto; the ``offset`` of each external initializer is the tensor's index, its
            ``length`` the bytes.

    Returns:
        Bytes and payloads, in the order of the file.
    """
    return _Rewriter(model, _ROOT_INITIALIZERS, _inline_tensor, min_bytes=0).run()


def imported_domains(path: Path) -> frozenset[str]:
    """The operator domains a model file imports; ``""`` is the standard one.

    Raises:
        WireError: If the file ends inside a field or is no protobuf.
        OSError: If it cannot be read.
    """
    domains = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for field in fields(data, 0, len(data)):
            if field.number == _MODEL_OPSET_IMPORT and field.kind == _DELIMITED:
                inner = fields(data, field.payload, field.stop)
                names = [data[part.payload : part.stop] for part in inner if part.number == _OPSET_DOMAIN]
                domains.add(names[-1].decode(errors="replace") if names else "")
    return frozenset(domains)


def piece_size(piece: Piece) -> int:
    """The number of bytes a piece takes in the file."""
    return piece.nbytes if isinstance(piece, Payload) else len(piece)


def fields(data: Buffer, start: int, stop: int) -> Iterator[Field]:
    """The fields of the message in ``data[start:stop]``.

    Raises:
        WireError: If a field has an unknown wire type or reaches beyond ``stop``.
    """
    position = start
    while position < stop:
        tag, payload = _read_varint(data, position, stop)
        number, kind = tag >> 3, tag & 7
        if kind == _DELIMITED:
            size, payload = _read_varint(data, payload, stop)
        elif kind == _VARINT:
            size = _read_varint(data, payload, stop)[1] - payload
        elif kind in _FIXED_BYTES:
            size = _FIXED_BYTES[kind]
        else:
            size = -1
        if size < 0 or number == 0:
            raise WireError(f"no protobuf field starts at byte {position}")
        end = payload + size
        if end > stop:
            raise WireError(f"the field at byte {position} ends {end - stop} bytes beyond its message")
        yield Field(number, kind, position, payload, end)
        position = end


def _read_varint(data: Buffer, position: int, stop: int) -> tuple[int, int]:
    """The little-endian base-128 number at ``position`` and the position after it."""
    value = 0
    for shift, index in enumerate(range(position, min(stop, position + _MAX_VARINT_BYTES))):
        byte = data[index]
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value, index + 1
    raise WireError(f"the number at byte {position} has no end")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _delimited(number: int, size: int) -> bytes:
    """The tag and length of a length-delimited field."""
    return _varint(number << 3 | _DELIMITED) + _varint(size)


@dataclass(frozen=True)
class _Rewriter:
    """Edits the tensors of a serialized model and adjusts every length above them.

    Attributes:
        data: The serialized model.
        tree: Which fields to descend into.
        edit: The pieces of a changed tensor, or None to leave it.
        min_bytes: Messages shorter than this are left alone.
    """

    data: Buffer
    tree: _Tree
    edit: _Edit
    min_bytes: int

    def run(self) -> list[Piece]:
        """The pieces of the whole model."""
        stop = len(self.data)
        pieces = self._message(_Message.MODEL, 0, stop)
        return [self.data[:stop]] if pieces is None else pieces

    def _message(self, message: _Message, start: int, stop: int) -> list[Piece] | None:
        """The pieces of the message in ``data[start:stop]``, or None if nothing in it changed."""
        pieces: list[Piece] = []
        unchanged = start
        for field in fields(self.data, start, stop):
            child = self.tree[message].get(field.number) if field.kind == _DELIMITED else None
            if child is None or field.stop - field.payload < self.min_bytes:
                continue
            if child is _Message.TENSOR:
                inner = self.edit(self.data, field.payload, field.stop)
            else:
                inner = self._message(child, field.payload, field.stop)
            if inner is not None:
                header = _delimited(field.number, sum(map(piece_size, inner)))
                pieces += [self.data[unchanged : field.start], header, *inner]
                unchanged = field.stop
        return [*pieces, self.data[unchanged:stop]] if pieces else None


def _external_pieces(data: Buffer, start: int, stop: int, *, location: str) -> list[Piece] | None:
    """A TensorProto whose ``raw_data`` is external data at its place in this file; None if it is small or absent."""
    parts = list(fields(data, start, stop))
    raw = [part for part in parts if part.number == _TENSOR_RAW_DATA and part.kind == _DELIMITED]
    if len(raw) != 1 or raw[0].stop - raw[0].payload < INLINE_BYTES:
        return None
    entries = {"location": location, "offset": str(raw[0].payload), "length": str(raw[0].stop - raw[0].payload)}
    external = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    for key, value in entries.items():
        external.external_data.add(key=key, value=value)
    kept = [data[part.start : part.stop] for part in parts if part is not raw[0]]
    return [*kept, external.SerializeToString()]


def _inline_tensor(data: Buffer, start: int, stop: int) -> list[Piece] | None:
    """A TensorProto with a payload as its ``raw_data`` in place of external data; None if it has none."""
    tensor = onnx.TensorProto.FromString(data[start:stop])
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    entries = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    payload = Payload(index=entries["offset"], nbytes=entries["length"])
    return [tensor.SerializeToString(), _delimited(_TENSOR_RAW_DATA, payload.nbytes), payload]
