"""Where a scale can be put on the input of Linears, and taken out of their weights.

============= ============================ ==================================================
absorbed by   readers                      after a rotation
============= ============================ ==================================================
a norm's γ    all Linears that read it     as before: γ is 1 then, in the rotated basis
V's columns   O, head by head              as before: R2 is offline on both sides
up's columns  down                         only without R4, whose online Hadamard lies between
============= ============================ ==================================================

V has one scale for all query heads that share a KV head. What V's cache holds is scaled with it.
"""

from dataclasses import dataclass

import onnx_ir as ir

from quarot_onnx.graph.caches import forward
from quarot_onnx.graph.linear import Linear, linear_producing
from quarot_onnx.graph.query import SIZE_ONLY, consumers, data_input, through
from quarot_onnx.graph.shapes import Shapes
from quarot_onnx.graph.tags import is_online
from quarot_onnx.quantization.select import Selection
from quarot_onnx.sites.model import Attention, Kind, Norm, Sites
from quarot_onnx.sites.operands import NotTracedError, follow_to_linear


@dataclass(frozen=True, eq=False)
class Place:
    """Something that can absorb a scale, and who reads it.

    Attributes:
        source: A norm, or a Linear whose output columns are scaled.
        readers: The Linears whose input it makes.
        start: The first of the Linear's columns.
        heads: KV heads, query heads and length of a head where columns serve several query heads; None where the
            readers' input features are the columns themselves.
        cache: The output of the graph that carries what is scaled.
    """

    source: Norm | Linear
    readers: tuple[Linear, ...]
    start: int = 0
    heads: tuple[int, int, int] | None = None
    cache: str | None = None


@dataclass(frozen=True)
class Refused:
    """A Linear whose input nothing can scale, and why."""

    linear: str
    reason: str


def find_places(sites: Sites, selection: Selection) -> tuple[tuple[Place, ...], tuple[Refused, ...]]:
    """The places whose readers' inputs are quantized, in the order of norms, attentions, MLPs.

    Args:
        sites: Of the model as it is quantized, rotated or not.
        selection: What is quantized of it.
    """
    wanted = {job.linear.node for job in selection.linears if job.config.activation is not None}
    found: list[Place] = []
    refused: list[Refused] = []
    told: set[ir.Node] = set()

    def consider(readers: tuple[Linear, ...], place: Place | str) -> None:
        if not any(linear.node in wanted for linear in readers):
            return
        flipped = next((linear for linear in readers if linear.transposed_input), None)
        if flipped is not None:
            place = "a Gemm with transA takes it transposed"
        if isinstance(place, Place):
            found.append(place)
        else:
            refused.extend(Refused(linear.name, place) for linear in readers if linear.node in wanted)
            told.update(linear.node for linear in readers)

    for site in sites.norms:
        gamma = "the norm before it has no γ" if site.norm.gamma is None else Place(site.norm, site.readers)
        consider(site.readers, gamma)
    for attention in sites.attentions:
        if attention.output is not None:
            consider((attention.output,), _values(attention, sites))
    for down in sites.mlps:
        consider((down,), _product(down, selection.survey.shapes))
    why = next((f"the norms are not followed here: {entry.reason}" for entry in sites.why_not(Kind.R1)), None)
    known = {linear.node for place in found for linear in place.readers} | told
    refused += [
        Refused(job.name, why or "what makes its input is not known")
        for job in selection.linears
        if job.linear.node in wanted - known
    ]
    return tuple(found), tuple(refused)


def _values(attention: Attention, sites: Sites) -> Place | str:
    """V's columns before O; why not where that is."""
    value = attention.value
    if value is None or attention not in sites.r2:
        return "the values that it reads could not be traced to a Linear"
    if value.bias_is_spread:
        return f"the bias of {value.name} is one number for all outputs"
    heads = (attention.num_kv_heads, attention.num_heads, attention.head_dim)
    assert attention.output is not None
    return Place(value, (attention.output,), attention.value_start, heads, attention.value_cache)


def _product(down: Linear, shapes: Shapes) -> Place | str:
    """The up projection, where down reads act(gate) · up; why not where it does not."""
    producer = down.input.producer()
    if producer is not None and is_online(producer):
        return "the online rotation (R4) lies before it"
    if producer is None or producer.op_type != "Mul" or len(consumers(down.input)) != 1:
        return "its input is not the product of a Linear"
    why = "its input is not the product of a Linear"
    for operand in producer.inputs:
        if operand is None or _moved(operand):
            continue
        try:
            up = follow_to_linear(operand, producer, "what it reads", shapes)
        except NotTracedError as error:
            why = str(error)
            continue
        if up.width != down.in_features or up.linear.bias_is_spread:
            continue
        leaving = _leaving(up.linear.output if up.width == up.linear.out_features else through(operand), down)
        if leaving is None:
            return Place(up.linear, (down,), up.start)
        why = f"what would be scaled leaves the graph as {leaving.name!r}"
    return why


def _leaving(start: ir.Value, down: Linear) -> ir.Value | None:
    """An output of the graph that holds what is scaled, if there is one."""

    def step(node: ir.Node, index: int) -> list[ir.Value]:
        return [] if node.op_type in SIZE_ONLY or (node is down.node and index == 0) else list(node.outputs)

    return next((value for value in forward([start], step) if value.is_graph_output()), None)


def _moved(value: ir.Value) -> bool:
    """Whether an operand's channels may lie elsewhere than a Linear, or a Split or Slice of one, put them."""
    node = through(value).producer()
    if node is not None and node.op_type in ("Split", "Slice"):
        value = data_input(node)
    return linear_producing(through(value)) is None
