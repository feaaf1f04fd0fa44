"""Where every byte of a saved model goes, and writing it one weight at a time.

The skeleton is the serialized model with an external tensor in each weight's place. It is a few megabytes however large
the model. Beside it the weights are streamed into a data file, or (``wire.inline_pieces``) between the pieces of the
skeleton for a single file.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from quarot_onnx.io import wire
from quarot_onnx.io.nodes import all_graphs
from quarot_onnx.io.tensors import computed_ahead, read_array
from quarot_onnx.progress import Progress

_ALIGNMENT = 64  # a cache line, and what vector loads want
_PAGE = 4096  # so that large tensors can be mapped
_PAGE_ALIGNED_FROM = 1 << 20


@dataclass(frozen=True)
class Layout:
    """A model laid out for writing.

    Attributes:
        pieces: The ``.onnx`` file; its payloads index ``tensors``.
        tensors: The weights outside the skeleton, each once even if several initializers share it.
        offsets: Their places in the data file; unused for a single file.
        data_bytes: Bytes of the data file; 0 for a single file.
    """

    pieces: list[wire.Piece]
    tensors: list[ir.TensorProtocol]
    offsets: list[int]
    data_bytes: int

    @property
    def model_bytes(self) -> int:
        """Bytes of the ``.onnx`` file."""
        return sum(map(wire.piece_size, self.pieces))

    def write_data(self, path: Path, progress: Progress | None) -> None:
        """Write the data file."""
        total = sum(tensor.nbytes for tensor in self.tensors)
        done = 0
        with path.open("wb") as file, closing(computed_ahead(self.tensors)) as tensors:
            for offset in self.offsets:
                file.write(bytes(offset - file.tell()))
                done += _write_tensor(file, next(tensors))  # none is held while the next but one is begun
                if progress is not None:
                    progress(done, total)

    def write_model(self, path: Path, progress: Progress | None) -> None:
        """Write the ``.onnx`` file, with the weights if there is no data file."""
        total = sum(piece.nbytes for piece in self.pieces if isinstance(piece, wire.Payload))
        done = 0
        payloads = (self.tensors[piece.index] for piece in self.pieces if isinstance(piece, wire.Payload))
        with path.open("wb") as file, closing(computed_ahead(payloads)) as tensors:
            for piece in self.pieces:
                if isinstance(piece, bytes):
                    file.write(piece)
                    continue
                done += _write_tensor(file, next(tensors))
                if progress is not None:
                    progress(done, total)


def lay_out(model: ir.Model, *, data_name: str | None) -> Layout:
    """Lay a model out.

    Args:
        model: The model; left as it is.
        data_name: File name of the data file beside the ``.onnx`` file, or None for a single file. In a single file the
            weights of subgraphs (``If``, ``Loop``) are held in memory together; those of the main graph are streamed in
            both cases.
    """
    weights = streamed_weights(model) if data_name is not None else _graph_weights(model.graph)
    tensors = list({id(tensor): tensor for tensor in weights.values()}.values())
    if data_name is not None:
        offsets, data_bytes = _offsets(tensors)
    else:
        offsets, data_bytes = list(range(len(tensors))), 0
    place = {id(tensor): offset for tensor, offset in zip(tensors, offsets, strict=True)}
    stand_ins = {
        value: ir.ExternalTensor(
            data_name or "",
            place[id(tensor)],
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name or "",
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )
        for value, tensor in weights.items()
    }
    with _swapped(model, stand_ins):
        skeleton = ir.serde.serialize_model(model).SerializeToString()
    pieces: list[wire.Piece] = [skeleton] if data_name is not None else wire.inline_pieces(skeleton)
    return Layout(pieces, tensors, offsets, data_bytes)


def streamed_weights(model: ir.Model) -> dict[ir.Value, ir.TensorProtocol]:
    """The initializers that do not stay in the skeleton: at least ``wire.INLINE_BYTES`` and not strings."""
    return {value: tensor for graph in all_graphs(model) for value, tensor in _graph_weights(graph).items()}


def _graph_weights(graph: ir.Graph) -> dict[ir.Value, ir.TensorProtocol]:
    return {
        value: tensor
        for value in graph.initializers.values()
        if (tensor := value.const_value) is not None
        and tensor.dtype != ir.DataType.STRING
        and tensor.nbytes >= wire.INLINE_BYTES
    }


def _offsets(tensors: list[ir.TensorProtocol]) -> tuple[list[int], int]:
    """The aligned place of each tensor in the data file, and the file's size."""
    offsets, end = [], 0
    for tensor in tensors:
        alignment = _PAGE if tensor.nbytes >= _PAGE_ALIGNED_FROM else _ALIGNMENT
        offsets.append(-(-end // alignment) * alignment)
        end = offsets[-1] + tensor.nbytes
    return offsets, end


@contextmanager
def _swapped(model: ir.Model, stand_ins: Mapping[ir.Value, ir.TensorProtocol]) -> Iterator[None]:
    """The model with stand-ins in its initializers, and every other lazy or external one read; undone at the end."""
    originals = [
        (value, tensor)
        for graph in all_graphs(model)
        for value in graph.initializers.values()
        if (tensor := value.const_value) is not None
    ]
    try:
        for value, tensor in originals:
            if value in stand_ins:
                value.const_value = stand_ins[value]
            elif isinstance(tensor, (ir.LazyTensor, ir.ExternalTensor)):
                value.const_value = ir.Tensor(read_array(tensor), dtype=tensor.dtype, name=value.name)
        yield
    finally:
        for value, tensor in originals:
            value.const_value = tensor


def _write_tensor(file: BinaryIO, tensor: ir.TensorProtocol) -> int:
    """Write a tensor; its bytes."""
    start = file.tell()
    if isinstance(tensor, (ir.Tensor, ir.ExternalTensor, ir.LazyTensor)):
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())
    written = file.tell() - start
    assert written == tensor.nbytes, f"tensor {tensor.name!r} wrote {written} bytes, declared {tensor.nbytes}"
    return written
