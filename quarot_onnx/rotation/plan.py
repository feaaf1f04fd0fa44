"""HOW a model is rotated, as data: from Sites and a request to a tuple of edits, validated whole.

Nothing is changed here. A plan that cannot be carried out raises before anything is touched.

The algebra, with y = x W, W: [in, out], R orthogonal (QuaRot, Ashkboos et al. 2024, section 4; SpinQuant,
Liu et al. 2024, section 3.1):

* R1: embedding E ← E R; writers W ← W R, b ← b R; readers W ← Rᵀ diag(γ) W, γ ← 1.
* R2: V's columns W_V ← W_V (I ⊗ R), b_V ← b_V (I ⊗ R); O's rows W_O ← (I ⊗ R)ᵀ W_O.
* R3: Q ← Q R, K ← K R after RoPE, online; (Q R)(K R)ᵀ = Q Kᵀ.
* R4 and online pairs: x ← c·x R online, W ← (1/c) Rᵀ W.
"""

from collections.abc import Callable

from quarot_onnx.errors import ConfigError
from quarot_onnx.graph.linear import Linear
from quarot_onnx.hadamard.online import OnlineFactors
from quarot_onnx.hadamard.orders import missing, usual_block
from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.rotation.edits import Edit, GammaEdit, HeadEdit, OnlineEdit, Plan, WeightEdit
from quarot_onnx.rotation.request import Demand, RotationRequest
from quarot_onnx.rotation.steps import WeightSteps
from quarot_onnx.rotation.transform import Rotate, Scale, Step
from quarot_onnx.sites.feasible import feasible, why_not
from quarot_onnx.sites.model import BY_CONFIG, Attention, Kind, LeftOut, Sites, grouped

__all__ = ["Demand", "GammaEdit", "HeadEdit", "OnlineEdit", "Plan", "RotationRequest", "WeightEdit", "plan_rotation"]


def plan_rotation(sites: Sites, request: RotationRequest) -> Plan:
    """Turn sites and a request into edits.

    Args:
        sites: What was found or given.
        request: What is wanted.

    Returns:
        The plan; without edits where nothing that is wanted is possible.

    Raises:
        ConfigError: A required rotation is impossible, or a size differs.
    """
    return _Planner(sites, request).plan()


class _Planner:
    """Collects the steps of every weight, then makes one transform of each."""

    def __init__(self, sites: Sites, request: RotationRequest) -> None:
        given = {kind for kind, matrix in ((Kind.R1, request.r1), (Kind.R2, request.r2)) if matrix is not None}
        self._sites = feasible(sites, request.block_sizes, given)
        self._request = request
        self._steps = WeightSteps()
        self._others: list[Edit] = []
        self._rotations: dict[str, Rotation] = {}
        self._factors: dict[str, OnlineFactors] = {}
        self._counts: dict[str, int] = {}
        self._notes: list[str] = []
        self._caches: dict[str, str] = {}

    def plan(self) -> Plan:
        """Plan each kind that is wanted."""
        self._check_matrix_dim()
        for kind, make in ((Kind.R1, self._r1), (Kind.R2, self._r2), (Kind.R3, self._r3), (Kind.R4, self._r4)):
            if self._request.wants(kind):
                self._kind(kind, make)
        self._pairs()
        return Plan(
            (*self._steps.edits(), *self._others), self._rotations, self._counts, tuple(self._notes), self._caches
        )

    def _check_matrix_dim(self) -> None:
        wanted, hidden = self._request.r_matrix_dim, self._sites.hidden_size
        if wanted is not None and hidden and wanted != hidden:
            raise ConfigError(
                f"r_matrix_dim is {wanted}, but the graph's hidden size is {hidden}; "
                f"set r_matrix_dim to {hidden} or leave it out"
            )

    def _kind(self, kind: Kind, make: Callable[[list[LeftOut]], int]) -> None:
        """Plan one kind; refuse, or note, what it cannot reach."""
        reasons = list(self._sites.why_not(kind))
        done = make(reasons)
        if done:
            self._counts[kind] = done
        if done and not reasons:
            return
        lines = grouped(reasons) or ["the graph has no place for it"]
        why = lines[0] if len(lines) == 1 else f"{lines[0]} (and {len(lines) - 1} other reasons)"
        if self._request.demands[kind] is Demand.REQUIRED and not done:
            if reasons and all(entry.reason == BY_CONFIG for entry in reasons):
                raise ConfigError(
                    f"leave_out.{kind} names every place of {kind} in this model; leave {kind} out instead"
                )
            raise ConfigError(f"{kind} is impossible in this model: {why}; leave {kind} out")
        what = f"done at {done} places, left out elsewhere" if done else "left out"
        self._notes += [f"{kind} {what}: {line}" for line in lines]

    def _r1(self, reasons: list[LeftOut]) -> int:
        sites, size = self._sites, self._sites.hidden_size
        if not sites.norms:
            return 0
        origin = sites.embeddings[0].name if sites.embeddings else sites.norms[0].norm.name
        given, seed, block = self._request.r1, self._request.seed, self._request.block_sizes.get(Kind.R1)
        if not self._possible("R1", origin, size, Kind.R1, reasons, given=given, seed=seed, block=block):
            return 0
        rotation = self._rotations["R1"]
        write = Rotate(1, rotation)
        for embedding in sites.embeddings:
            self._steps.add(embedding.node, 0, embedding.table, write)
        for linear in sites.writers:
            self._steps.weight(linear, write)
            self._bias(linear, write)
        for site in sites.norms:
            for linear in site.readers:
                if site.norm.gamma is not None:
                    self._steps.weight(linear, Scale(0, site.norm.gamma.tensor, site.norm.gamma_offset))
                self._steps.weight(linear, Rotate(0, rotation))
            if site.norm.gamma is not None:
                self._others.append(GammaEdit(site.norm))
        return len(sites.norms)

    def _r2(self, reasons: list[LeftOut]) -> int:
        seed = None if self._request.seed is None else self._request.seed + 1
        done = 0
        for attention in self._sites.r2:
            size = attention.head_dim
            name = f"R2[{size}]"
            if not self._possible(name, attention.name, size, Kind.R2, reasons, given=self._request.r2, seed=seed):
                continue
            assert attention.value is not None
            assert attention.output is not None
            step = Rotate(1, self._rotations[name], attention.value_start, attention.value_stop)
            self._steps.weight(attention.value, step)
            self._bias(attention.value, step)
            self._steps.weight(attention.output, Rotate(0, self._rotations[name]))
            self._cache(attention.value_cache, name)
            done += 1
        return done

    def _r3(self, reasons: list[LeftOut]) -> int:
        return sum(self._heads(attention, reasons) for attention in self._sites.r3)

    def _heads(self, attention: Attention, reasons: list[LeftOut]) -> bool:
        name = f"R3[{attention.head_dim}]"
        if not self._possible(name, attention.name, attention.head_dim, Kind.R3, reasons):
            return False
        self._others.append(HeadEdit(attention, self._rotations[name]))
        self._cache(attention.key_cache, name)
        return True

    def _cache(self, output: str | None, name: str) -> None:
        """Write down which rotation an output of the graph holds from now on."""
        if output is not None:
            self._caches[output] = name

    def _r4(self, reasons: list[LeftOut]) -> int:
        block = self._request.block_sizes.get(Kind.R4)
        return sum(self._online(linear, Kind.R4, block, reasons) for linear in self._sites.mlps)

    def _pairs(self) -> None:
        """Online pairs of a config file: each is required."""
        taken = {linear.node for linear in self._sites.mlps} if self._request.wants(Kind.R4) else set()
        for pair in self._sites.online_pairs:
            if pair.linear.node in taken:
                raise ConfigError(f"online_pairs names {pair.linear.name}, which already gets R4; take it out of one")
            reasons: list[LeftOut] = []
            if not self._online(pair.linear, "pair", pair.block_size, reasons):
                raise ConfigError(f"online_pairs: {pair.linear.name}: {reasons[0].reason}; take it out")
        if self._sites.online_pairs:
            self._counts["online_pairs"] = len(self._sites.online_pairs)

    def _online(self, linear: Linear, kind: str, block: int | None, reasons: list[LeftOut]) -> bool:
        size = linear.in_features
        name = f"{kind}[{size}]" if block is None else f"{kind}[{size}/{block}]"
        if not self._possible(name, linear.name, size, Kind.R4, reasons, block=block):
            return False
        if name not in self._factors:
            self._factors[name] = self._rotations[name].online()
        factors = self._factors[name]
        self._steps.weight(linear, Rotate(0, self._rotations[name]))
        if factors.weight_scale != 1.0:
            self._steps.weight(linear, Scale(0, None, factor=factors.weight_scale))
        self._others.append(OnlineEdit(linear, factors, kind))
        return True

    def _possible(
        self,
        name: str,
        node: str,
        size: int,
        kind: Kind,
        reasons: list[LeftOut],
        *,
        given: Rotation | None = None,
        seed: int | None = None,
        block: int | None = None,
    ) -> bool:
        """Make the rotation ``name`` once; False, with the reason, where there is none worth having."""
        if name in self._rotations:
            return True
        if given is not None and given.size != size:
            raise ConfigError(f"{kind}'s matrix {given.origin} is of size {given.size}, but the graph needs {size}")
        if given is None and block is None and (usual := usual_block(size)) != size:
            block = usual
            if block is None:  # online pairs alone: of the rest what is possible was looked at before
                reasons.append(LeftOut(node, why_not(size) or "", kind))
                return False
            self._notes.append(f"{name}: {missing(size)}; block-diagonal with blocks of {block} instead")
        self._rotations[name] = given or Rotation.hadamard(size, seed=seed, block_size=block)
        return True

    def _bias(self, linear: Linear, step: Step) -> None:
        if linear.bias is None:
            return
        if linear.bias_is_spread:
            raise ConfigError(f"the bias of {linear.name} is one number for all outputs and cannot be rotated")
        self._steps.add(linear.bias.node, linear.bias.index, linear.bias.constant, step)
