"""The rotation config: a file that says WHERE rotations go, in one of three dialects told apart by their keys.

=================  ==========================================================  ============================
dialect            recognised by                                               states
=================  ==========================================================  ============================
our own            ``format``                                                  whatever it has keys for
AMD Quark ONNX     ``R1_pairs``                                                R1 at those places
AMD Quark torch    ``model_decoder_layers``, ``backbone``, ``online-had`` ...  R1 and R2; R3 and R4 if online
=================  ==========================================================  ============================
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import onnx_ir as ir

from quarot_onnx.config.files import FileConfig
from quarot_onnx.errors import ConfigError, OutputError, did_you_mean
from quarot_onnx.rotation_config.dialect_own import OwnConfig, as_config
from quarot_onnx.rotation_config.dialect_quark_onnx import QuarkOnnxConfig
from quarot_onnx.rotation_config.dialect_quark_torch import QuarkTorchConfig, read_quark_torch
from quarot_onnx.rotation_config.names import Names, Ref
from quarot_onnx.rotation_config.places_r1 import NamedPair, r1_places, unproven
from quarot_onnx.rotation_config.read_own import read_own
from quarot_onnx.rotation_config.statements import Statements
from quarot_onnx.sites.detect import Survey, refuse_quantized
from quarot_onnx.sites.leaving import without_leaks
from quarot_onnx.sites.model import Kind, Sites

__all__ = ["Dialect", "Named", "as_config", "read_sites", "write_config"]


class Dialect(StrEnum):
    """Who defined the form of a file."""

    OWN = "quarot_onnx"
    QUARK_ONNX = "AMD Quark ONNX"
    QUARK_TORCH = "AMD Quark torch"


_KEYS: dict[Dialect, tuple[str, ...]] = {
    Dialect.OWN: ("format",),
    Dialect.QUARK_ONNX: ("R1_pairs",),
    Dialect.QUARK_TORCH: ("model_decoder_layers", "online-had", "online_had", "backbone"),
}
"""The keys that tell the dialects apart, in the order in which they are looked for."""

_CONFIGS: dict[Dialect, type[OwnConfig | QuarkOnnxConfig | QuarkTorchConfig]] = {
    Dialect.OWN: OwnConfig,
    Dialect.QUARK_ONNX: QuarkOnnxConfig,
    Dialect.QUARK_TORCH: QuarkTorchConfig,
}


@dataclass(frozen=True, eq=False)
class Named:
    """What a rotation config says about one model.

    Attributes:
        sites: The places, restricted to what the file states and what was asked for beyond it.
        kinds: The rotations that the file states.
        block_sizes: Blocks that the file asks for, by rotation; a missing one is not block-diagonal.
        dialect: Who defined the form of the file.
        notes: What the user should know.
    """

    sites: Sites
    kinds: frozenset[Kind]
    block_sizes: Mapping[Kind, int]
    dialect: Dialect
    notes: tuple[str, ...]


class _AnyFile(FileConfig):
    """A file of whatever dialect: its content as plain data."""

    content: dict[str, Any]

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The whole mapping is the content."""
        return {"content": data}


def read_sites(
    path: Path | str | Mapping[str, Any],
    survey: Survey,
    *,
    asked: frozenset[Kind] = frozenset(),
    split_cache: bool = False,
) -> Named:
    """Read a rotation config for a model.

    Args:
        path: A .json or .yaml file, or its content.
        survey: The float model; its weights are not read.
        asked: Rotations that are wanted though the file may not state them: they go where detection finds places.
        split_cache: The other graphs that share its caches are rotated alike.

    Returns:
        The places by name, checked against the graph.

    Raises:
        ConfigError: The file is not readable or of no known dialect; a key is unknown, a node missing or in the
            wrong place, a size wrong. Names the file, the key and the node, with the nearest match.
        ModelError: The graph is already quantized.
    """
    source = "rotation config" if isinstance(path, Mapping) else str(path)
    content = dict(path) if isinstance(path, Mapping) else _AnyFile.load(path).content
    dialect = _recognise(content, source)
    config = _CONFIGS[dialect].from_dict(content, source=source)
    found = survey.visible() if asked or _needs_detection(config) else _undetected(survey.model)
    try:
        stated = _stated(config, survey.model.graph, found)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    notes = (*stated.notes, unproven(found)) if stated.r1 is not None and not found.norms else stated.notes
    sites = without_leaks(stated.on(found, asked), survey.model, split_cache=split_cache)
    return Named(sites, stated.kinds, stated.block_sizes, dialect, notes)


def write_config(
    sites: Sites, path: Path | str, block_sizes: Mapping[Kind, int] | None = None, *, overwrite: bool = True
) -> None:
    """Write sites to a .json file in our own dialect.

    Args:
        sites: What detection found or a file named.
        path: Where to.
        block_sizes: Blocks of block-diagonal R1 and R4.
        overwrite: Whether a file of other content may be replaced.

    Raises:
        ConfigError: A node has no name to be called by.
        OutputError: The file cannot be written, or must not be replaced.
    """
    config, file = OwnConfig.from_dict(as_config(sites, block_sizes)), Path(path)
    if os.path.lexists(file) and not overwrite and not _holds(file, config.json_for(path)):
        raise OutputError(f"{path} exists with other content; name another file, or replace it with --overwrite")
    config.to_json(path)


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_bytes() == text.encode()
    except OSError:
        return False


def _recognise(content: Mapping[str, Any], source: str) -> Dialect:
    """The dialect of a file."""
    for dialect, keys in _KEYS.items():
        if any(key in content for key in keys):
            return dialect
    known = [key for keys in _KEYS.values() for key in keys]
    near = next(filter(None, (did_you_mean(str(key), known) for key in content)), "")
    dialects = "; ".join(f"{dialect} by {' or '.join(keys)}" for dialect, keys in _KEYS.items())
    if not content:
        raise ConfigError(f"{source}: it has no keys; one tells the dialect, {dialects} (docs/rotation_config.md)")
    found = (
        f"the key {next(iter(content))!r} is" if len(content) == 1 else f"the keys {', '.join(map(repr, content))} are"
    )
    raise ConfigError(f"{source}: {found} of no known dialect{near}; the keys that tell: {dialects}")


def _needs_detection(config: FileConfig) -> bool:
    """Whether anything but online pairs is stated: those go into any graph, a decoder or not."""
    return not isinstance(config, OwnConfig) or config.speaks_of_decoder


def _undetected(model: ir.Model) -> Sites:
    refuse_quantized(model.graph)
    return Sites((), (), (), (), (), (), 0, 0, tied=False, architecture="not looked at", left_out=())


def _stated(config: FileConfig, graph: ir.Graph, found: Sites) -> Statements:
    """What the file states, resolved in the graph."""
    if isinstance(config, QuarkTorchConfig):
        return read_quark_torch(config, graph, found)
    names = Names(graph)
    if isinstance(config, OwnConfig):
        return read_own(config, graph, names, found)
    assert isinstance(config, QuarkOnnxConfig)
    pairs = [
        NamedPair(
            tuple(Ref(f"R1_pairs[{i}].prev_nodes[{j}]", name) for j, name in enumerate(pair.prev_nodes)),
            None if pair.norm_node is None else Ref(f"R1_pairs[{i}].norm_node", pair.norm_node),
            tuple(Ref(f"R1_pairs[{i}].next_nodes[{j}]", name) for j, name in enumerate(pair.next_nodes)),
        )
        for i, pair in enumerate(config.R1_pairs)
    ]
    return Statements(frozenset({Kind.R1}), r1=r1_places("R1_pairs", pairs, graph, names, found))
