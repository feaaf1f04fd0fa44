"""HOW a model is rotated, as data: from Sites and a request to a tuple of edits, validated whole.

Nothing is changed here. A plan that cannot be carried out raises before anything is touched.

The algebra, with y = x W, W: [in, out], R orthogonal (QuaRot, Ashkboos et al. 2024, section 4; SpinQuant,
Liu et al. 2024, section 3.1):

* R1: embedding E ← E R; writers W ← W R, b ← b R; readers W ← Rᵀ diag(γ) W, γ ← 1.
* R2: V's columns W_V ← W_V (I ⊗ R), b_V ← b_V (I ⊗ R); O's rows W_O ← (I ⊗ R)ᵀ W_O.
* R3: Q ← Q R, K ← K R after RoPE, online; (Q R)(K R)ᵀ = Q Kᵀ.
* R4 and online pairs: x ← c·x R online, W ← (1/c) Rᵀ W.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import onnx_ir as ir

from quarot_onnx.errors import ConfigError
from quarot_onnx.graph.linear import WEIGHT_INPUT, Linear
from quarot_onnx.graph.query import Constant, attribute_int
from quarot_onnx.hadamard.online import OnlineFactors
from quarot_onnx.hadamard.orders import construct, largest_block
from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.rotation.recipe import Recipe, Rotate, Scale, Step
from quarot_onnx.sites.model import Attention, Kind, Norm, Sites


class Demand(StrEnum):
    """How much one of the four rotations is wanted."""

    OFF = "off"
    IF_POSSIBLE = "if possible"
    REQUIRED = "required"


@dataclass(frozen=True)
class RotationRequest:
    """What the user wants.

    Attributes:
        demands: For each kind; a missing kind is off.
        seed: Random signs for R1 and R2 (R2 uses seed + 1); None for plain Hadamards.
        r_matrix_dim: R1's size, checked against the graph; None: the graph decides.
        block_sizes: Kinds that are block-diagonal, with their blocks.
        r1: A given orthogonal matrix for R1.
        r2: A given orthogonal matrix for R2.
    """

    demands: Mapping[Kind, Demand]
    seed: int | None = None
    r_matrix_dim: int | None = None
    block_sizes: Mapping[Kind, int] = field(default_factory=dict)
    r1: Rotation | None = None
    r2: Rotation | None = None

    def wants(self, kind: Kind) -> bool:
        """Whether a kind is wanted at all."""
        return self.demands.get(kind, Demand.OFF) is not Demand.OFF


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """Replace what enters ``node`` at ``index`` by a recipe's result."""

    node: ir.Node
    index: int
    recipe: Recipe


@dataclass(frozen=True, eq=False)
class GammaEdit:
    """Replace a norm's γ, now folded into its readers, by ones."""

    norm: Norm


@dataclass(frozen=True, eq=False)
class OnlineEdit:
    """Put an online rotation before a Linear."""

    linear: Linear
    factors: OnlineFactors
    kind: str


@dataclass(frozen=True, eq=False)
class HeadEdit:
    """Rotate Q and K of an attention online."""

    attention: Attention
    rotation: Rotation


Edit = WeightEdit | GammaEdit | OnlineEdit | HeadEdit


@dataclass(frozen=True, eq=False)
class Plan:
    """The edits, and what they amount to.

    Attributes:
        edits: In an order that can be carried out.
        rotations: The rotations used, by kind and size, for records.
        counts: Sites rotated, by kind.
        notes: What the user should know (a block-diagonal fall-back, a kind that was left out).
    """

    edits: tuple[Edit, ...]
    rotations: Mapping[str, Rotation]
    counts: Mapping[str, int]
    notes: tuple[str, ...]

    def record(self) -> dict[str, object]:
        """What was done, for the output's metadata: JSON types only."""
        return {
            "counts": dict(self.counts),
            "rotations": {name: rotation.to_dict() for name, rotation in self.rotations.items()},
            "notes": list(self.notes),
        }


def plan_rotation(sites: Sites, request: RotationRequest) -> Plan:
    """Turn sites and a request into edits.

    Args:
        sites: What was found or given.
        request: What is wanted.

    Returns:
        The plan.

    Raises:
        ConfigError: A required rotation is impossible, a size differs, nothing is left to do.
    """
    return _Planner(sites, request).plan()


class _Planner:
    """Collects the steps of every weight, then makes one recipe of each."""

    def __init__(self, sites: Sites, request: RotationRequest) -> None:
        self._sites = sites
        self._request = request
        self._steps: dict[tuple[ir.Node, int], tuple[Constant, bool, list[Step]]] = {}
        self._others: list[Edit] = []
        self._rotations: dict[str, Rotation] = {}
        self._factors: dict[str, OnlineFactors] = {}
        self._counts: dict[str, int] = {}
        self._notes: list[str] = []

    def plan(self) -> Plan:
        """Plan each kind that is wanted."""
        self._check_matrix_dim()
        todo = {
            Kind.R1: (self._sites.norms, self._r1),
            Kind.R2: (self._sites.r2, self._r2),
            Kind.R3: (self._sites.r3, self._r3),
            Kind.R4: (self._sites.mlps, self._r4),
        }
        for kind, (places, make) in todo.items():
            if not self._request.wants(kind):
                continue
            self._report_left_out(kind, len(places))
            if places:
                make()
                self._counts[kind] = len(places)
        self._pairs()
        weights = [
            WeightEdit(node, index, Recipe(constant, tuple(steps), stored_transposed=stored))
            for (node, index), (constant, stored, steps) in self._steps.items()
        ]
        return Plan((*weights, *self._others), self._rotations, self._counts, tuple(self._notes))

    def _check_matrix_dim(self) -> None:
        wanted, hidden = self._request.r_matrix_dim, self._sites.hidden_size
        if wanted is not None and hidden and wanted != hidden:
            raise ConfigError(
                f"r_matrix_dim is {wanted}, but the graph's hidden size is {hidden}; "
                f"set r_matrix_dim to {hidden} or leave it out"
            )

    def _report_left_out(self, kind: Kind, found: int) -> None:
        """Refuse or note what a wanted kind cannot reach."""
        reasons = list(self._sites.why_not(kind))
        if found and not reasons:
            return
        why = f"{reasons[0].node}: {reasons[0].reason}" if reasons else "the graph has no place for it"
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        if self._request.demands[kind] is Demand.REQUIRED and not found:
            raise ConfigError(f"{kind} is impossible in this model: {why}{more}; leave {kind} out")
        self._notes.append(f"{kind} {'done at %d places, left out elsewhere' % found if found else 'left out'}: {why}{more}")

    def _hadamard(self, size: int, what: str, *, seed: int | None, block: int | None) -> Rotation:
        """A Hadamard of ``size``, block-diagonal where no full one is known."""
        if block is None and construct(size) is None:
            block = largest_block(size)
            self._notes.append(
                f"{what}: no Hadamard matrix of order {size} is known; block-diagonal with blocks of {block} instead"
            )
        return Rotation.hadamard(size, seed=seed, block_size=block)

    def _given(self, rotation: Rotation, size: int, what: str) -> Rotation:
        if rotation.size != size:
            raise ConfigError(f"{what}'s given matrix {rotation.origin} is of size {rotation.size}, the graph needs {size}")
        return rotation

    def _add(self, node: ir.Node, index: int, constant: Constant, step: Step, *, stored: bool = False) -> None:
        self._steps.setdefault((node, index), (constant, stored, []))[2].append(step)

    def _weight(self, linear: Linear, step: Step) -> None:
        stored = linear.node.op_type == "Gemm" and bool(attribute_int(linear.node, "transB", 0))
        self._add(linear.node, WEIGHT_INPUT, linear.weight, step, stored=stored)

    def _bias(self, linear: Linear, step: Step) -> None:
        if linear.bias is not None:
            if linear.bias.constant.shape[-1] != linear.out_features:
                raise ConfigError(f"the bias of {linear.name} is one number for all outputs and cannot be rotated")
            self._add(linear.bias.node, linear.bias.index, linear.bias.constant, step)

    def _r1(self) -> None:
        size, request = self._sites.hidden_size, self._request
        if request.r1 is not None:
            rotation = self._given(request.r1, size, "R1")
        else:
            rotation = self._hadamard(size, "R1", seed=request.seed, block=request.block_sizes.get(Kind.R1))
        self._rotations["R1"] = rotation
        write = Rotate(1, rotation)
        for embedding in self._sites.embeddings:
            self._add(embedding.node, 0, embedding.table, write)
        for linear in self._sites.writers:
            self._weight(linear, write)
            self._bias(linear, write)
        for site in self._sites.norms:
            for linear in site.readers:
                if site.norm.gamma is not None:
                    self._weight(linear, Scale(0, site.norm.gamma.tensor, site.norm.gamma_offset))
                self._weight(linear, Rotate(0, rotation))
            if site.norm.gamma is not None:
                self._others.append(GammaEdit(site.norm))

    def _r2(self) -> None:
        request = self._request
        seed = None if request.seed is None else request.seed + 1
        for attention in self._sites.r2:
            size = attention.head_dim
            name = f"R2[{size}]"
            if name not in self._rotations:
                given = request.r2
                self._rotations[name] = (
                    self._given(given, size, "R2") if given else self._hadamard(size, "R2", seed=seed, block=None)
                )
            rotation = self._rotations[name]
            assert attention.value is not None
            assert attention.output is not None
            step = Rotate(1, rotation, attention.value_start, attention.value_stop)
            self._weight(attention.value, step)
            self._bias(attention.value, step)
            self._weight(attention.output, Rotate(0, rotation))

    def _r3(self) -> None:
        for attention in self._sites.r3:
            name = f"R3[{attention.head_dim}]"
            if name not in self._rotations:
                self._rotations[name] = self._hadamard(attention.head_dim, "R3", seed=None, block=None)
            self._others.append(HeadEdit(attention, self._rotations[name]))

    def _r4(self) -> None:
        for linear in self._sites.mlps:
            self._online(linear, "R4", self._request.block_sizes.get(Kind.R4))

    def _pairs(self) -> None:
        for pair in self._sites.online_pairs:
            if self._request.wants(Kind.R4) and pair.linear.node in {linear.node for linear in self._sites.mlps}:
                raise ConfigError(f"online_pairs names {pair.linear.name}, which already gets R4; take it out of one")
            self._online(pair.linear, "pair", pair.block_size)
        if self._sites.online_pairs:
            self._counts["online_pairs"] = len(self._sites.online_pairs)

    def _online(self, linear: Linear, kind: str, block: int | None) -> None:
        size = linear.in_features
        name = f"{kind}[{size}]" if block is None else f"{kind}[{size}/{block}]"
        if name not in self._rotations:
            self._rotations[name] = self._hadamard(size, kind, seed=None, block=block)
            self._factors[name] = self._rotations[name].online()
        factors = self._factors[name]
        self._weight(linear, Rotate(0, self._rotations[name]))
        if factors.weight_scale != 1.0:
            self._weight(linear, Scale(0, None, factor=factors.weight_scale))
        self._others.append(OnlineEdit(linear, factors, kind))

