"""Our own dialect's file, resolved in a graph."""

from collections.abc import Iterable
from typing import TypeVar

import onnx_ir as ir

from quarot_onnx.config.strict import Strict
from quarot_onnx.errors import ConfigError
from quarot_onnx.rotation_config.dialect_own import OwnConfig
from quarot_onnx.rotation_config.names import Names, Ref
from quarot_onnx.rotation_config.places_online import Places, divides
from quarot_onnx.rotation_config.places_r1 import NamedPair, r1_places
from quarot_onnx.rotation_config.statements import R1Places, Statements
from quarot_onnx.rotation_config.templates import Layers
from quarot_onnx.sites.model import Kind, Sites

_T = TypeVar("_T", bound=Strict)


def read_own(config: OwnConfig, graph: ir.Graph, names: Names, found: Sites) -> Statements:
    """What the file states.

    Args:
        config: The file.
        graph: The graph.
        names: Its names.
        found: What detection found in it.

    Raises:
        ConfigError: A name, a template or a size does not fit the graph.
    """
    layers = Layers(names, config.to_dict(), found.layers)
    places = Places(names, found)

    def listed(key: str, entries: tuple[_T, ...] | None) -> list[tuple[str, _T]]:
        return [(f"{key}[{i}]", one) for i, entry in enumerate(entries or ()) for one in layers.entries(entry)]

    return Statements(
        kinds=frozenset(kind for kind in Kind if getattr(config, kind) is not None),
        r1=_r1(config, layers, graph, names, found),
        r2=places.r2(listed("R2", config.R2)) if config.R2 else None,
        r3=places.r3(listed("R3", config.R3)) if config.R3 else None,
        r4=places.r4(listed("R4", config.R4)) if config.R4 else None,
        online_pairs=places.online_pairs(listed("online_pairs", config.online_pairs)),
        left_out={
            Kind.R2: frozenset(map(places.attention_node, _left_out(config, Kind.R2, layers))),
            Kind.R3: frozenset(map(places.attention_node, _left_out(config, Kind.R3, layers))),
            Kind.R4: frozenset(map(places.mlp_node, _left_out(config, Kind.R4, layers))),
        },
        block_sizes=_block_sizes(config),
    )


def _r1(config: OwnConfig, layers: Layers, graph: ir.Graph, names: Names, found: Sites) -> R1Places | None:
    """R1's places, unless detection is to find them."""
    if config.R1 is None:
        return None
    pairs = [
        NamedPair(
            _refs(f"R1.pairs[{i}].previous", pair.previous),
            None if pair.norm is None else Ref(f"R1.pairs[{i}].norm", pair.norm),
            _refs(f"R1.pairs[{i}].readers", pair.readers),
        )
        for i, entry in enumerate(config.R1.pairs)
        for pair in layers.entries(entry)
    ]
    places = r1_places("R1.pairs", pairs, graph, names, found) if pairs else None
    size = places.hidden_size if places else found.hidden_size
    if config.R1.hidden_size not in (None, size) and size:
        raise ConfigError(f"R1.hidden_size is {config.R1.hidden_size}, but the residual stream has {size}")
    divides("R1.block_size", config.R1.block_size, size)
    return places


def _refs(place: str, names: Iterable[str]) -> tuple[Ref, ...]:
    return tuple(Ref(f"{place}[{j}]", name) for j, name in enumerate(names))


def _left_out(config: OwnConfig, kind: Kind, layers: Layers) -> Iterable[Ref]:
    return layers.names(list(_refs(f"leave_out.{kind}", getattr(config.leave_out, kind))))


def _block_sizes(config: OwnConfig) -> dict[Kind, int]:
    """The blocks of R1 and R4; R4 has one for all places.

    Raises:
        ConfigError: R4's places differ.
    """
    blocks = {Kind.R1: config.R1.block_size if config.R1 else None}
    for index, entry in enumerate(config.R4 or ()):
        first = blocks.setdefault(Kind.R4, entry.block_size)
        if entry.block_size != first:
            raise ConfigError(
                f"R4[{index}].block_size is {entry.block_size} at {entry.node!r}, but R4[0].block_size {first}: "
                "R4 has one for all its places; name the others in online_pairs, which have each their own"
            )
    return {kind: block for kind, block in blocks.items() if block is not None}
