"""AMD Quark torch's QuaRot config: paths of modules, matched against the scopes in the names of nodes.

::

    {"name": "quarot", "online-had": false, "backbone": "model", "model_decoder_layers": "model.layers",
     "v_proj": "self_attn.v_proj", "o_proj": "self_attn.o_proj", "self_attn": "self_attn"}

Quark applies R1 and R2 always, and with ``online-had`` also R3 if the KV cache and R4 if activations are quantized
(``kv_cache_quant``, ``act_quant``: true unless stated); its later releases have one switch for each rotation. The
places are those of the structure; the paths must agree with them.
"""

from typing import Annotated, Any, Literal

import onnx_ir as ir
from pydantic import Field, StrictBool

from quarot_onnx.config.algorithm import BlockSize
from quarot_onnx.config.files import FileConfig
from quarot_onnx.errors import ConfigError, did_you_mean
from quarot_onnx.graph.linear import linears
from quarot_onnx.graph.query import label
from quarot_onnx.rotation_config.statements import Statements
from quarot_onnx.sites.model import Kind, Sites

_Path = Annotated[str, Field(min_length=1)]

_ELSEWHERE = {
    "random": "use_random_had",
    "random2": "use_random_had",
    "random_r1": "use_random_had",
    "random_r2": "use_random_had",
    "optimized_rotation_path": "r1_matrix_path and r2_matrix_path",
}
"""Keys that say which matrices, not where; what says it here."""


class QuarkTorchConfig(FileConfig):
    """The whole file; the defaults are Quark's.

    Attributes:
        name: Quark's name of the algorithm.
        online_had: Whether R3 and R4 are done; written ``online-had`` in files.
        kv_cache_quant: R3 is worth it.
        act_quant: R4 is worth it.
        r1: Later releases' switch of R1. Likewise the other three.
        rotation_size: Block of block-diagonal rotations.
        backbone: Path of the decoder.
        model_decoder_layers: Path of the list of its layers.
        v_proj: Path of the value projection within a layer. Likewise the other three.
        scaling_layers: The places of R1 by module; the graph's structure shows them.
        random: Which matrices: not read from here. Likewise the rest.
    """

    synonyms = ("online-had",)

    name: Literal["quarot", "rotation"] = "quarot"
    online_had: StrictBool = True
    kv_cache_quant: StrictBool = True
    act_quant: StrictBool = True
    r1: StrictBool = True
    r2: StrictBool = True
    r3: StrictBool = True
    r4: StrictBool = True
    rotation_size: BlockSize | None = None
    backbone: _Path = "model"
    model_decoder_layers: _Path = "model.layers"
    v_proj: _Path = "self_attn.v_proj"
    o_proj: _Path = "self_attn.o_proj"
    self_attn: _Path = "self_attn"
    mlp: _Path = "mlp"
    scaling_layers: Any = None
    random: StrictBool = False
    random2: StrictBool = False
    random_r1: StrictBool = False
    random_r2: StrictBool = False
    optimized_rotation_path: str | None = None

    @classmethod
    def normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Take ``online-had`` for ``online_had``."""
        if "online-had" in data:
            if "online_had" in data:
                raise ValueError("online-had and online_had are the same key; keep one of them")
            data["online_had"] = data.pop("online-had")
        return data

    @property
    def kinds(self) -> frozenset[Kind]:
        """The rotations that the file asks for."""
        switches = {
            Kind.R1: self.r1,
            Kind.R2: self.r2,
            Kind.R3: self.r3 and self.online_had and self.kv_cache_quant,
            Kind.R4: self.r4 and self.online_had and self.act_quant,
        }
        return frozenset(kind for kind, on in switches.items() if on)


def read_quark_torch(config: QuarkTorchConfig, graph: ir.Graph, found: Sites) -> Statements:
    """Match the paths of a file with the places that detection found.

    Args:
        config: The file.
        graph: The graph.
        found: What detection found in it.

    Raises:
        ConfigError: The graph is no decoder, its names carry no scopes, or a path is not where the structure is.
    """
    if not found.layers:
        raise ConfigError("model_decoder_layers: the graph is no decoder that is understood, so there are no layers")
    scopes = {_scope(node) for node in graph} - {""}
    _check_scopes(config, graph, scopes, found.layers)
    for index, attention in enumerate(found.attentions):
        layer = f"{config.model_decoder_layers}.{index}"
        _agree("self_attn", f"{layer}.{config.self_attn}", attention.node, scopes)
        if attention.value is not None:
            _agree("v_proj", f"{layer}.{config.v_proj}", attention.value.node, scopes)
        if attention.output is not None:
            _agree("o_proj", f"{layer}.{config.o_proj}", attention.output.node, scopes)
    for index, linear in enumerate(found.mlps if Kind.R4 in config.kinds else ()):
        _agree("mlp", f"{config.model_decoder_layers}.{index}.{config.mlp}", linear.node, scopes, within=True)
    blocked = config.kinds & {Kind.R1, Kind.R4}
    blocks = {} if config.rotation_size is None else dict.fromkeys(blocked, config.rotation_size)
    return Statements(config.kinds, block_sizes=blocks, notes=_notes(config))


def _scope(node: ir.Node) -> str:
    """The module that a node's name shows: ``/model/layers.0/mlp/Mul`` lies in ``model.layers.0.mlp``."""
    path = (node.name or "").strip("/").split("/")
    return ".".join(path[:-1])


def _check_scopes(config: QuarkTorchConfig, graph: ir.Graph, scopes: set[str], layers: int) -> None:
    """The backbone and every layer have nodes."""
    known = {".".join(path[: i + 1]) for path in (scope.split(".") for scope in scopes) for i in range(len(path))}
    if not any(_scope(linear.node) for linear in linears(graph)):
        first = next((linear.name for linear in linears(graph)), "none")
        raise ConfigError(
            f"model_decoder_layers: the names of this graph's nodes ({first!r} ...) carry no module paths, as in "
            "exports by torch.onnx.export(dynamo=True); leave the rotation config out, or use "
            '{"format": "quarot_onnx/1", "R1": "detect", "R2": "detect"}'
        )
    # Not any node of layer N shows a further layer: one exporter numbers the final norm as if it were in one.
    last = f"{config.model_decoder_layers}.{layers - 1}"
    for key, path in (("backbone", config.backbone), ("model_decoder_layers", config.model_decoder_layers)):
        if path not in known and not any(scope.startswith(f"{path}.") for scope in known):
            roots = ", ".join(sorted({repr(scope.split(".")[0]) for scope in known}))
            raise ConfigError(f"{key}: no node lies in {path!r}{did_you_mean(path, known)}; there are {roots}")
    if last not in known or f"{config.model_decoder_layers}.{layers}.{config.mlp}" in known:
        raise ConfigError(
            f"model_decoder_layers: the graph has {layers} decoder layers, which {config.model_decoder_layers!r} "
            "does not number from 0 on"
        )


def _agree(key: str, path: str, node: ir.Node, scopes: set[str], *, within: bool = False) -> None:
    """The node lies in the module, or somewhere in it."""
    scope = _scope(node)
    if scope == path or (within and scope.startswith(f"{path}.")):
        return
    if path not in scopes and not any(known.startswith(f"{path}.") for known in scopes):
        raise ConfigError(f"{key}: no node lies in {path!r}{did_you_mean(path, [scope, *scopes])}")
    raise ConfigError(f"{key}: the place is {path!r} by the file, but node {label(node)!r} by the graph")


def _notes(config: QuarkTorchConfig) -> tuple[str, ...]:
    """What the file says that is not read from it."""
    ignored = [f"{key} (set {here} instead)" for key, here in _ELSEWHERE.items() if getattr(config, key)]
    if config.scaling_layers:
        ignored.append("scaling_layers (the graph's structure shows these places)")
    return (f"not read from the rotation config: {', '.join(ignored)}",) if ignored else ()
