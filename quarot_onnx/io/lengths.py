"""Lengths that a graph leaves free, fixed in the file that is written: toolchains of NPUs take no others.

An export names its free lengths (``batch_size``, ``past_sequence_length + sequence_length``); shapes of inputs, outputs
and whatever the exporter wrote in between carry the names. A sum is fixed once all its terms are.
"""

from collections.abc import Iterator, Mapping
from numbers import Integral
from pathlib import Path

import onnx
import onnx_ir as ir

from quarot_onnx.errors import ConfigError, did_you_mean

_DIGITS = 10


def parse_lengths(given: list[str]) -> dict[str, int]:
    """``["batch_size=1"]`` as names and lengths.

    Raises:
        ConfigError: One is no NAME=VALUE, or a name has two values.
    """
    found: dict[str, int] = {}
    for item in given:
        name, equals, value = (part.strip() for part in item.rpartition("="))
        if not equals or not name or not value.isdecimal() or len(value) > _DIGITS or int(value) < 1:
            raise ConfigError(
                f"--fix-shape {item}: write NAME=VALUE, as in batch_size=1; VALUE is 1 or more, and fits into 31 bits"
            )
        if found.setdefault(name, int(value)) != int(value):
            raise ConfigError(f"--fix-shape {item} contradicts {name}={found[name]}; leave out one of them")
    return found


def checked_lengths(model: ir.Model, wanted: Mapping[str, int]) -> dict[str, int]:
    """Lengths by name, that an input of the graph has.

    Raises:
        ConfigError: None has; with those that there are. Or what is wanted is no length.
    """
    if not isinstance(wanted, Mapping):
        raise ConfigError(f"fix_shapes is a {type(wanted).__name__}: give lengths by name, as in {{'batch_size': 1}}")
    shapes = [value.shape for value in model.graph.inputs if value.shape is not None]
    dims = [dim.value for shape in shapes for dim in shape if not isinstance(dim, int) and dim.value]
    names = list(dict.fromkeys(term for dim in dims for term in terms(dim) if not term.isdecimal()))
    for name, value in wanted.items():
        if name not in names:
            there = f"its free lengths are {', '.join(names)}" if names else "all of its lengths are fixed"
            near = did_you_mean(name, names)
            raise ConfigError(f"fix_shapes (--fix-shape) {name}={value}: no input has such a length{near}; {there}")
    return {name: _length(name, value) for name, value in wanted.items()}


def _length(name: str, value: object) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool) and 1 <= int(value) < 1 << 31:
        return int(value)
    raise ConfigError(
        f"fix_shapes (--fix-shape) {name}={value!r}: a length is a whole number from 1 on that fits into 31 bits"
    )


def fix_lengths(file: Path, wanted: Mapping[str, int]) -> None:
    """Fix lengths in a model's file; its weights stay where they are.

    Args:
        file: The ``.onnx`` file, which is rewritten.
        wanted: Lengths by name.
    """
    proto = onnx.load(file, load_external_data=False)
    for dim in _dims(proto.graph):
        summands = [wanted.get(term, term) for term in terms(dim.dim_param)]
        if all(isinstance(term, int) or term.isdecimal() for term in summands):
            dim.dim_value = sum(int(term) for term in summands)
    onnx.save(proto, file)


def terms(dim: str) -> list[str]:
    """The names and numbers that a length is the sum of."""
    return [term.strip() for term in dim.split("+")]


def _dims(graph: onnx.GraphProto) -> Iterator[onnx.TensorShapeProto.Dimension]:
    """The lengths with a name, in subgraphs too."""
    for info in (*graph.input, *graph.output, *graph.value_info):
        yield from (dim for dim in info.type.tensor_type.shape.dim if dim.dim_param)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _dims(inner)
