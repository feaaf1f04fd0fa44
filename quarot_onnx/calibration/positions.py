"""How many positions a model was made for, as the files beside it say or its tables show."""

from pathlib import Path

import onnx_ir as ir

from quarot_onnx.errors import CalibrationError
from quarot_onnx.graph.query import FLOAT_TYPES, resolve_constant
from quarot_onnx.io.companions import GENAI_CONFIG, read_json, section

_ROPE = frozenset({"GroupQueryAttention", "RotaryEmbedding"})
_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def position_note(folder: Path, length: int) -> tuple[str, ...]:
    """What to say of windows that are longer than a model's positions.

    They are no error: RoPE goes on, and some configs state the positions before they were stretched.

    Args:
        folder: The model's folder.
        length: Tokens of a window.

    Returns:
        One note, or none.

    Raises:
        CalibrationError: A config that is not readable.
    """
    found = stated_positions(folder)
    if found is None or length <= found[0]:
        return ()
    limit, said = found
    note = (
        f"windows of {length} tokens are longer than the {limit} positions that the model was made for ({said}): what "
        f"is measured on them may mean little; use {limit} or fewer"
    )
    return (note,)


def positions_of(folder: Path, graph: ir.Graph) -> int | None:
    """A model's positions, as files beside it say or its tables show, the fewer; None where neither does.

    Raises:
        CalibrationError: A config that is not readable.
    """
    stated, shown = stated_positions(folder), table_positions(graph)
    return min((count for count in (stated and stated[0], shown) if count), default=None)


def table_positions(graph: ir.Graph) -> int | None:
    """The rows of the shortest constant table of cosines that an operator for RoPE reads; None without any."""
    rows = []
    for node in graph:
        if node.op_type in _ROPE:
            tables = (resolve_constant(value) for value in node.inputs[1:])
            rows += [t.shape[0] for t in tables if t is not None and len(t.shape) == 2 and t.dtype in FLOAT_TYPES]
    return min(rows, default=None)


def stated_positions(folder: Path) -> tuple[int, str] | None:
    """The number of positions, and where it stands.

    Raises:
        CalibrationError: A config that is not readable.
    """
    config = read_json(folder / "config.json", CalibrationError)
    for part in (config, section(config, "text_config")):  # that of models that see, too
        for key in _KEYS:
            if type(part.get(key)) is int and part[key] > 0:
                return part[key], f"{key} in config.json"
    length = section(read_json(folder / GENAI_CONFIG, CalibrationError), "model").get("context_length")
    return (length, f"context_length in {GENAI_CONFIG}") if type(length) is int and length > 0 else None


def sliding_window(folder: Path) -> int | None:
    """How many tokens a sliding window shows, as config.json states it; None without one.

    Raises:
        CalibrationError: The file is not readable.
    """
    config = read_json(folder / "config.json", CalibrationError)
    for part in (config, section(config, "text_config")):
        window, kinds = part.get("sliding_window"), part.get("layer_types")
        slides = not isinstance(kinds, list) or "sliding_attention" in kinds
        if type(window) is int and window > 0 and slides and part.get("use_sliding_window", True):
            return window
    return None
