"""What a configuration asks of a model: the places of the rotations and how much each is wanted."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import QuarotConfig, SmoothQuantConfig
from quarot_onnx.errors import ConfigError, first_and_more
from quarot_onnx.graph.linear import linears
from quarot_onnx.graph.tags import is_online
from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.quantization.select import Selection
from quarot_onnx.rotation.plan import Demand, RotationRequest
from quarot_onnx.rotation_config.config_file import read_sites
from quarot_onnx.sites.detect import Survey
from quarot_onnx.sites.model import Kind, LeftOut, Sites
from quarot_onnx.smoothing.places import find_places

_FLAGS = {Kind.R1: "r1", Kind.R2: "r2", Kind.R3: "r3", Kind.R4: "r4"}

_R3_NOTE = (
    "R3 is done because the rotation config states it; it pays only with a quantized key/value cache "
    "(r3=False, on the command line --no-r3, leaves it out)"
)

_NO_R3_NOTE = (
    "the rotation config states no R3, which quantized keys gain from: state it there, or switch it on (r3=True, on "
    "the command line --r3)"
)

_SPLIT_NOTE = (
    "split_cache (--split-cache): R2 and R3 change the cache; rotate every graph that shares it with the same options"
)


def sites_and_request(
    survey: Survey,
    config: QuarotConfig,
    default: frozenset[Kind],
    needless: Mapping[ir.Node, str] | None = None,
) -> tuple[Sites, RotationRequest, tuple[str, ...]]:
    """Combine the graph, the rotation config file and the switches.

    Args:
        survey: The float model.
        config: The switches, and perhaps a rotation config file.
        default: The rotations to do where possible, when neither a file nor a switch speaks of them.
        needless: Linears before which R4 does not pay, with the reason, as from `needless_r4`; None where that is not
            known.

    Returns:
        The places, what is wanted there, and what the user should know of the file.

    Raises:
        ConfigError: The file or a matrix does not fit the graph.
        ModelError: The graph is already quantized.
    """
    notes: tuple[str, ...] = ()
    switches = {kind: getattr(config, flag) for kind, flag in _FLAGS.items()}
    asked = frozenset(kind for kind, switch in switches.items() if switch)
    block_sizes: Mapping[Kind, int] = {}
    if config.r_config_path is not None:
        named = read_sites(config.r_config_path, survey, asked=asked, split_cache=config.split_cache)
        wanted = default
        sites, default, block_sizes, notes = named.sites, named.kinds, named.block_sizes, named.notes
        demands = dict.fromkeys(default, Demand.REQUIRED)
        _refuse_other_blocks(config, block_sizes)
        if switches[Kind.R3] is None and (Kind.R3 in default) != (Kind.R3 in wanted):
            notes = (*notes, _R3_NOTE if Kind.R3 in default else _NO_R3_NOTE)
    else:
        sites = survey.rotatable(split_cache=config.split_cache)
        demands = dict.fromkeys(default, Demand.IF_POSSIBLE)
    for kind, switch in switches.items():
        if switch is not None:
            demands[kind] = Demand.REQUIRED if switch else Demand.OFF
    if config.split_cache:
        notes = (*notes, _SPLIT_NOTE)
    if needless is not None and demands.get(Kind.R4, Demand.OFF) is Demand.IF_POSSIBLE:
        sites = _without_needless(sites, needless)
    request = RotationRequest(
        demands,
        seed=config.seed if config.use_random_had else None,
        r_matrix_dim=config.r_matrix_dim,
        block_sizes=dict.fromkeys((Kind.R1, Kind.R4), config.block_size) if config.block_size else block_sizes,
        r1=_matrix("r1_matrix_path (--r1-matrix)", config.r1_matrix_path),
        r2=_matrix("r2_matrix_path (--r2-matrix)", config.r2_matrix_path),
    )
    if config.r_config_path is not None and not sites.online_pairs and not any(map(request.wants, Kind)):
        raise ConfigError(
            f'{config.r_config_path}: it states no rotation that is done; state one, as "R1": "detect", name nodes in '
            "online_pairs, or go without the file, which puts rotations where the graph shows places"
        )
    return sites, request, notes


def _refuse_other_blocks(config: QuarotConfig, stated: Mapping[Kind, int]) -> None:
    """Refuse a size of blocks beside a file that states another one.

    Raises:
        ConfigError: It does.
    """
    for kind, size in stated.items():
        if config.block_size not in (None, size):
            raise ConfigError(
                f"block_size (--block-size) {config.block_size} contradicts {config.r_config_path}, which states "
                f"blocks of {size} for {kind}: leave out one of them"
            )


def _matrix(key: str, path: Path | None) -> Rotation | None:
    """A given rotation."""
    try:
        return None if path is None else Rotation.from_npy(path)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _without_needless(sites: Sites, needless: Mapping[ir.Node, str]) -> Sites:
    """The places without R4 where it would cost time and gain nothing."""
    inside = tuple(linear for linear in sites.mlps if linear.node not in needless)
    reasons = tuple(
        LeftOut(linear.name, needless[linear.node], Kind.R4) for linear in sites.mlps if linear.node in needless
    )
    return replace(sites, mlps=inside, left_out=(*sites.left_out, *reasons))


def needless_r4(selection: Selection, config: QConfig) -> dict[ir.Node, str]:
    """The Linears before which R4 does not pay, with the reason.

    Those are inputs that stay in float, and inputs with a fixed scale that SmoothQuant can scale: R4 would keep it from
    that, and is worth less there (docs/accuracy.md).

    Args:
        selection: What will be quantized, of a model that is not rotated yet.
        config: How.
    """
    quantized, survey = quantized_inputs(selection), selection.survey
    in_float = (linear.node for linear in linears(survey.model.graph) if linear.node not in quantized)
    found = dict.fromkeys(in_float, "its input stays in float")
    if any(isinstance(item, SmoothQuantConfig) for item in config.algo_config):
        specs = {job.linear.node: job.config.activation for job in selection.linears}
        places, _ = find_places(survey.rotatable(), selection)
        for linear in (linear for place in places for linear in place.readers):
            spec = specs.get(linear.node)
            if spec is not None and spec.has_fixed_scale:
                found[linear.node] = (
                    "SmoothQuant scales its input instead (r4=True, on the command line --r4, for both)"
                )
    return found


def needless_notes(selection: Selection) -> tuple[str, ...]:
    """What to say of online rotations before Linears whose inputs stay in float.

    Args:
        selection: What will be quantized, of a rotated model.
    """
    quantized = quantized_inputs(selection)
    found = [
        item.name
        for item in linears(selection.survey.model.graph)
        if item.node not in quantized and _behind_online(item.input)
    ]
    if not found:
        return ()
    note = (
        f"the online rotation before {first_and_more(found)} costs time at every step and gains little, as the input "
        "there stays in float: quantize it, or leave R4 out there"
    )
    return (note,)


def _behind_online(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and is_online(producer)


def quantized_inputs(selection: Selection) -> frozenset[ir.Node]:
    """The Linears whose inputs are quantized."""
    return frozenset(job.linear.node for job in selection.linears if job.config.activation is not None)


def kinds_for(config: QConfig) -> frozenset[Kind]:
    """The rotations that a scheme needs: R4 only pays where some activation is quantized, R3 where keys are.

    Balanced keys have a Hadamard of their own.
    """
    layers = [
        config.global_config,
        *(rule.config for rule in (*config.specific_layer_config, *config.layer_type_config)),
    ]
    activations = any(layer is not None and layer.activation is not None for layer in layers)
    kinds = {Kind.R1, Kind.R2, Kind.R4} if activations else {Kind.R1, Kind.R2}
    keys = config.kv_cache is not None and config.kv_cache.rotates_keys and not config.balances_keys
    return frozenset(kinds | {Kind.R3} if keys else kinds)
