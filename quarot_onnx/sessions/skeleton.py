"""Run a graph that was changed in structure only, its weights left where they are.

Calibration adds outputs to a graph and throws others away; the weights, often many gigabytes, stay as they were. The
changed graph is serialized without them and handed to onnxruntime as bytes, with its external tensors named relative to
the folder of their data file (``session.model_external_initializers_file_folder_path``). That may be the ``.onnx`` file
of a single-file export. Nothing is written and no weight is copied.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from quarot_onnx.errors import ModelError
from quarot_onnx.io.nodes import all_graphs
from quarot_onnx.sessions import runtime
from quarot_onnx.sessions.providers import open_session, refusal

_SMALL = 1 << 10  # bytes; below, a tensor may be a shape, which onnxruntime must see to infer others
_MAX_INLINE = 1 << 30  # half of what a protobuf message can hold: the serialization makes a second copy


def open_augmented(
    model: ir.Model, *, threads: int | None = None, low_memory: bool = True, exact_products: bool = False
) -> Any:
    """Open a session on a graph whose weights are external tensors.

    Nodes run as early as they can (``PRIORITY_BASED``), lowest index first: in onnxruntime's default order all
    reductions that hang off a long chain wait for its end, and every activation with them.

    Args:
        model: The model, its large tensors external (as ``model_io.load`` gives them). It is not changed.
        threads: onnxruntime's intra-op threads; None for its default.
        low_memory: Do without packed copies of every weight, whose speed a calibration does not need.
        exact_products: As for ``runtime.session``.

    Returns:
        An ``onnxruntime.InferenceSession``, on the provider of ``running_on``.

    Raises:
        ModelError: Large weights in memory, or onnxruntime refuses the graph.
        MissingPackageError: It uses onnxruntime-extensions and that is not installed.
    """
    import onnxruntime as ort  # noqa: PLC0415 (late: importing this module stays cheap)

    skeleton, folder = _serialize(model)
    options = runtime.session_options(
        runtime.graph_domains(model), threads=threads, low_memory=low_memory, exact_products=exact_products
    )
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        return open_session(skeleton, options)
    except ModelError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise ModelError(f"onnxruntime refuses the graph: {refusal(error)}") from error


def _serialize(model: ir.Model) -> tuple[bytes, Path | None]:
    """The graph without its weights, and the folder that its external tensors are relative to."""
    tensors = [value.const_value for graph in all_graphs(model) for value in graph.initializers.values()]
    inline = sum(
        tensor.nbytes for tensor in tensors if tensor is not None and not isinstance(tensor, ir.ExternalTensor)
    )
    if inline > _MAX_INLINE:
        raise ModelError(
            f"{inline / 1e9:.1f} GB of the model's weights are in memory: save the model, then open the file"
        )
    proto = ir.to_proto(model)
    # By what they take of which file: two subgraphs may have tensors of one name.
    small = {
        (tensor.location, tensor.offset or 0, tensor.nbytes): tensor
        for tensor in tensors
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes < _SMALL
    }
    external = []
    for tensor in _initializers(proto.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        place = (entries["location"], int(entries.get("offset", 0)), _bytes_of(tensor))
        if place in small:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = small[place].tobytes() if small[place].nbytes else b""
        else:
            external.append(tensor)
    base = {tensor.location: tensor.base_dir for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    # Links are resolved (hub caches keep data behind them): the data must lie in the folder that is named.
    paths = {entry.value: Path(base[entry.value], entry.value).resolve() for entry in map(_location, external)}
    folder = Path(os.path.commonpath([path.parent for path in paths.values()])) if paths else None
    for entry in map(_location, external):
        entry.value = os.path.relpath(paths[entry.value], folder)
    return proto.SerializeToString(), folder


def _bytes_of(tensor: onnx.TensorProto) -> int:
    """The bytes that a tensor takes, whatever it says of its length."""
    size: float = math.prod(tensor.dims) * ir.DataType(tensor.data_type).itemsize
    return math.ceil(size)


def _location(tensor: onnx.TensorProto) -> Any:
    return next(entry for entry in tensor.external_data if entry.key == "location")


def _initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            for subgraph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _initializers(subgraph)
