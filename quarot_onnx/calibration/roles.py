"""Which input of a decoder graph is which.

An export names its inputs as it likes; what they are shows in the graph. The token ids are the integer ``[batch, seq]``
input that indexes the embedding table (a Gather from a constant with as many rows as there are logits); a graph without
them takes embeddings, float ``[batch, seq, hidden]``. Position ids reach a cosine, a RotaryEmbedding or a second table;
a 4-D input is a mask where it is added to scores or compared, else a cache, and so is one of other axes, as long as
these, that the graph carries on to an output; what a single number counts shows where it ends
(:mod:`quarot_onnx.calibration.traced`). Names decide only what the structure leaves open, or where no graph is at hand
(an onnxruntime session shows inputs and outputs alone).
"""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from quarot_onnx.calibration.inputs import (
    FLOATS,
    INTEGERS,
    InputRole,
    TensorSpec,
    embedding_rows,
    is_position,
    position_axis,
)
from quarot_onnx.calibration.traced import length_role, mask_role
from quarot_onnx.errors import ModelError
from quarot_onnx.graph.caches import presents

_CACHE_TYPES = FLOATS | {ir.DataType.INT8, ir.DataType.UINT8}
_IDS = ("input_ids", "tokens", "ids")
_MASK_TYPES = INTEGERS | FLOATS | {ir.DataType.BOOL}
_MADE_TYPES = _MASK_TYPES - {ir.DataType.BFLOAT16}


def assign_roles(inputs: Sequence[TensorSpec], vocab_size: int | None, graph: ir.Graph) -> dict[str, InputRole]:
    """What each required input is for; ``UNKNOWN`` where nothing tells, ``UNREAD`` where nothing reads it, either.

    Args:
        inputs: The inputs that have no default.
        vocab_size: The width of the logits, to tell the embedding table from other tables; None where unknown.
        graph: The graph.

    Returns:
        Input name to role, in the order of ``inputs``.

    Raises:
        ModelError: A switch between two graphs.
    """
    values = {value.name: value for value in graph.inputs}
    main = main_input(inputs, vocab_size, graph)
    roles: dict[str, InputRole] = {}
    for spec in inputs:
        if spec.dtype == ir.DataType.BOOL and (spec.rank or 0) < 2 and not _is_unread(spec, values.get(spec.name)):
            raise ModelError(
                f"input {spec.name!r} is a switch between two graphs: export without the merged decoder "
                "(optimum: --no-post-process) or use the file with past inputs"
            )
        if main is not None and spec is main[0]:
            roles[spec.name] = main[1]
        else:
            roles[spec.name] = _role(spec, values.get(spec.name), set(roles.values()))
    unknown = [spec for spec in inputs if roles[spec.name] is InputRole.UNKNOWN]
    loose = (spec for spec in inputs if roles[spec.name] in (InputRole.UNKNOWN, InputRole.PAST))
    unread = [spec.name for spec in loose if _is_unread(spec, values.get(spec.name))]
    carried = _carried(unknown, inputs, roles, graph)
    return roles | dict.fromkeys(unread, InputRole.UNREAD) | dict.fromkeys(carried, InputRole.PAST)


def _is_unread(spec: TensorSpec, value: ir.Value | None) -> bool:
    """Whether nothing in the graph reads an input, and NumPy has its type: zeros will do."""
    return value is not None and not value.uses() and not value.is_graph_output() and spec.dtype in _MADE_TYPES


def _carried(
    unknown: Sequence[TensorSpec], inputs: Sequence[TensorSpec], roles: Mapping[str, InputRole], graph: ir.Graph
) -> list[str]:
    """Caches of other than four axes: what the graph carries on to an output, and is as long as the other caches.

    What has a length of its own is a state of another kind, such as a convolution's.
    """
    shapes = [spec.shape for spec in inputs if roles[spec.name] is InputRole.PAST and spec.shape is not None]
    columns = {shape[position_axis(shape)] for shape in shapes}
    carried = {value.name for value in presents(graph)} if unknown else set()
    return [
        spec.name
        for spec in unknown
        if spec.name in carried and spec.shape is not None and len(spec.shape) > 1
        if spec.shape[position_axis(spec.shape)] in columns
    ]


def main_input(
    inputs: Sequence[TensorSpec], vocab_size: int | None, graph: ir.Graph
) -> tuple[TensorSpec, InputRole] | None:
    """The token ids, or the embeddings that a graph takes in their place; None where there is neither."""
    integers = [spec for spec in inputs if spec.dtype in INTEGERS and spec.rank == 2]
    found = _indexing(integers, vocab_size, graph)
    if found is not None:
        return found, InputRole.TOKENS
    values = {value.name: value for value in graph.inputs}
    embedded = [
        spec
        for spec in inputs
        if spec.dtype in FLOATS and spec.shape is not None and spec.rank == 3 and isinstance(spec.shape[2], int)
        if _mask(spec, values.get(spec.name)) is None
    ]
    named = next((spec for spec in integers if spec.name in _IDS), None)
    if named is None and len(integers) == 1 and not embedded:
        named = integers[0]
    if named is not None:
        return named, InputRole.TOKENS
    return (embedded[0], InputRole.EMBEDDINGS) if embedded else None


def is_decoder(model: ir.Model) -> bool:
    """Whether an integer input ``[batch, sequence]`` of the graph indexes an embedding table.

    Where there is none, embeddings ``[batch, sequence, hidden]`` beside a cache, a mask or positions will do.
    """
    specs = [TensorSpec.of(value) for value in model.graph.inputs if value.name not in model.graph.initializers]
    integers = [spec for spec in specs if spec.dtype in INTEGERS and spec.rank == 2]
    if any(embedding_rows(model.graph, spec.name) is not None for spec in integers):
        return True
    main = main_input(specs, None, model.graph)
    beside = [spec for spec in specs if spec in integers or spec.rank == 4]
    return main is not None and main[1] is InputRole.EMBEDDINGS and bool(beside)


def _indexing(integers: Sequence[TensorSpec], vocab_size: int | None, graph: ir.Graph) -> TensorSpec | None:
    """The one that indexes the embedding table."""
    rows = {spec.name: embedding_rows(graph, spec.name) or 0 for spec in integers}
    named = [spec for spec in integers if rows[spec.name] and spec.name in _IDS]
    found = [spec for spec in integers if rows[spec.name] and rows[spec.name] == vocab_size]
    # A head of as many labels as there are types of tokens tells nothing of the ids.
    found = [] if any(rows[spec.name] > (vocab_size or 0) for spec in named) else found
    # A padded or quantized head can differ from the table's height: then the name, or else the largest table, tells.
    found = found or named
    found = found or [spec for spec in integers if rows[spec.name] == max(rows.values()) > 0]
    return found[0] if len(found) == 1 else None


def _role(spec: TensorSpec, value: ir.Value | None, taken: set[InputRole]) -> InputRole:
    """What an input is for that is not the main one."""
    if spec.rank is None:
        return InputRole.UNKNOWN
    if spec.rank < 2:
        return _short(spec, value)
    if spec.dtype in INTEGERS and spec.rank == 2:
        return _mask_or_positions(spec, value, taken)
    if spec.dtype in INTEGERS and spec.rank == 3 and ("position" in spec.name or (value and is_position(value))):
        return InputRole.POSITIONS
    mask = _mask(spec, value)
    if mask is not None:
        return mask
    return InputRole.PAST if spec.rank == 4 and spec.dtype in _CACHE_TYPES else InputRole.UNKNOWN


def _short(spec: TensorSpec, value: ir.Value | None) -> InputRole:
    """A number, or one for each position or row."""
    if spec.dtype not in INTEGERS:
        return InputRole.UNKNOWN
    single = not spec.shape or spec.shape == (1,)
    found = None if value is None else length_role(value)
    if found is not None and (single or found is InputRole.LAST_POSITION):
        return found
    if not single:
        is_known = "position" in spec.name or (value is not None and is_position(value))
        return InputRole.POSITIONS if is_known else InputRole.UNKNOWN
    if "logits_to_keep" in spec.name:
        return InputRole.KEPT
    if "past" in spec.name and "len" in spec.name:
        return InputRole.PAST_LENGTH
    return InputRole.TOTAL_LENGTH if "total" in spec.name and "len" in spec.name else InputRole.UNKNOWN


def _mask_or_positions(spec: TensorSpec, value: ir.Value | None, taken: set[InputRole]) -> InputRole:
    """Integers ``[batch, length]`` that are no token ids."""
    if "token_type" in spec.name:
        return InputRole.UNKNOWN
    if "mask" in spec.name:
        return InputRole.MASK
    if "position" in spec.name:
        return InputRole.POSITIONS
    if value is None or not value.uses():
        return InputRole.UNKNOWN
    if is_position(value):
        return InputRole.POSITIONS
    # Masks come in so many spellings that what is nothing else is taken for the mask, once.
    return InputRole.UNKNOWN if InputRole.MASK in taken else InputRole.MASK


def _mask(spec: TensorSpec, value: ir.Value | None) -> InputRole | None:
    """How a mask masks; None for what is none."""
    if spec.dtype not in _MASK_TYPES or spec.rank not in (2, 3, 4):
        return None
    found = None if value is None else mask_role(value)
    if found is None and "mask" in spec.name:
        found = InputRole.BIAS if (spec.rank or 0) > 2 else InputRole.MASK
    # Ones in a 2-D mask of floats hide nothing, whether they are multiplied or added.
    ones = spec.dtype not in FLOATS or spec.rank == 2
    return InputRole.MASK if found is InputRole.BIAS and ones else found
