"""Which nodes are quantized, and how: a configuration applied to a graph.

Only MatMuls and Gemms with a constant weight come into question, and embeddings where Gather is asked for; never
attention's own MatMuls, never the Hadamards of online rotations, never tables of cosines. What else holds a constant
matrix is told (:mod:`quarot_onnx.quantization.left_float`).
"""

from dataclasses import dataclass

import onnx_ir as ir

from quarot_onnx.config import QConfig
from quarot_onnx.config.kernels import saturable as _saturable
from quarot_onnx.config.spec import QLayerConfig, QTensorConfig
from quarot_onnx.errors import ConfigError, did_you_mean
from quarot_onnx.graph.linear import Linear, linears
from quarot_onnx.graph.query import FLOAT_TYPES, Constant, attribute_int, label, resolve_constant
from quarot_onnx.io.nodes import all_nodes
from quarot_onnx.io.spellings import weights_with_default
from quarot_onnx.sites.detect import Survey, refuse_hidden, refuse_quantized


@dataclass(frozen=True, eq=False)
class LinearJob:
    """A Linear to quantize; one without a weight spec keeps its weight."""

    linear: Linear
    config: QLayerConfig

    @property
    def name(self) -> str:
        """The node's name."""
        return self.linear.name


@dataclass(frozen=True, eq=False)
class TableJob:
    """An embedding to quantize."""

    node: ir.Node
    table: Constant
    config: QLayerConfig

    @property
    def name(self) -> str:
        """The node's name."""
        return label(self.node)

    @property
    def weight(self) -> QTensorConfig:
        """How the table is stored."""
        assert self.config.weight is not None, "a configuration refuses embeddings without one"
        return self.config.weight


@dataclass(frozen=True, eq=False)
class Selection:
    """All that will be quantized, in graph order.

    Attributes:
        survey: The float model that it was made on, and what was found in it.
        linears: The Linears.
        tables: The embeddings.
    """

    survey: Survey
    linears: tuple[LinearJob, ...]
    tables: tuple[TableJob, ...]


def select(survey: Survey, config: QConfig) -> Selection:
    """Apply a configuration to a graph.

    Args:
        survey: The float model.
        config: What the user wants.

    Returns:
        The selection.

    Raises:
        ConfigError: A name or pattern matches no node, the operators' versions are too old, nothing is selected.
        ModelError: The graph is already quantized.
    """
    model = survey.model
    refuse_quantized(model.graph)
    names = [label(node) for node in all_nodes(model.graph)]
    unmatched = config.unmatched_patterns(names)
    if unmatched:
        near = did_you_mean(unmatched[0], names)
        raise ConfigError(
            f"the configuration names {unmatched[0]!r}, but no node of the graph has this name{near}; "
            "correct it or take it out"
        )
    opset = model.graph.opset_imports.get("", 1)
    if opset < 13:
        raise ConfigError(f"the model uses opset {opset}; per-channel integers need 13 or later: export it anew")
    found = []
    for linear in linears(model.graph):
        chosen = config.layer_config_for(linear.name, linear.op_type)
        if chosen is not None:
            found.append(LinearJob(linear, chosen))
    tables = _tables(survey, config)
    if not found and not tables and config.kv_cache is None:
        refuse_hidden(model.graph)
        kinds = ", ".join(config.op_types_to_quantize)
        raise ConfigError(
            f"nothing to quantize: no {kinds} with a constant weight is left by the configuration"
            f"{weights_with_default(model.graph)}"
        )
    return Selection(survey, tuple(found), tuple(tables))


def saturable(selection: Selection, config: QConfig) -> bool:
    """Whether any of it saturates on processors without VNNI, see :func:`quarot_onnx.config.formats.saturable`."""
    return any(_saturable(job.config, config.resolved_format) for job in selection.linears)


def _tables(survey: Survey, config: QConfig) -> list[TableJob]:
    """The embeddings to quantize: in a decoder those that start its residual stream, elsewhere every table."""
    jobs = []
    for node in survey.model.graph:
        table = _table(node)
        chosen = config.layer_config_for(label(node), node.op_type) if table is not None else None
        if table is not None and chosen is not None:
            jobs.append(TableJob(node, table, chosen))
    embeddings = {embedding.node for embedding in survey.sites.embeddings} if jobs else set()
    return [job for job in jobs if not embeddings or job.node in embeddings]


def _table(node: ir.Node) -> Constant | None:
    """The float table of an embedding Gather, or None."""
    if node.op_type != "Gather" or attribute_int(node, "axis", 0) != 0 or resolve_constant(node.inputs[1]) is not None:
        return None
    table = resolve_constant(node.inputs[0])
    return table if table is not None and len(table.shape) == 2 and table.dtype in FLOAT_TYPES else None
