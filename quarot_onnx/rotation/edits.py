"""A rotation, smoothing or balancing of a model as data: small edits that are carried out together or not at all."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.graph.linear import Linear
from quarot_onnx.hadamard.online import OnlineFactors
from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.rotation.transform import WeightTransform
from quarot_onnx.sites.model import Attention, Norm


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """Replace what enters ``node`` at ``index`` by a transform's result."""

    node: ir.Node
    index: int
    transform: WeightTransform


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


@dataclass(frozen=True, eq=False)
class BalanceEdit:
    """Multiply every head of Q and K of an attention online by a matrix of its own: q ← q B, k ← (k − c) A.

    Attributes:
        attention: Its R3 site.
        queries: B, [query heads, head_dim, head_dim].
        keys: A, [KV heads, head_dim, head_dim].
        centres: c, [KV heads, head_dim]; None for 0.
    """

    attention: Attention
    queries: NDArray[np.float64]
    keys: NDArray[np.float64]
    centres: NDArray[np.float64] | None = None


Edit = WeightEdit | GammaEdit | OnlineEdit | HeadEdit | BalanceEdit


@dataclass(frozen=True, eq=False)
class Plan:
    """The edits, and what they amount to.

    Attributes:
        edits: In an order that can be carried out.
        rotations: The rotations used, by kind and size, for records.
        counts: Sites rotated, by kind.
        caches: The rotation of every output that carries a cache R2 or R3 changes, by the output's name.
        scales: What the values of a cache are multiplied by where they are scaled, [KV heads, head_dim], by the same.
        matrices: So for heads that are multiplied by a matrix, [KV heads, head_dim, head_dim].
        centres: What is taken off before that, [KV heads, head_dim], where anything is.
        notes: What the user should know (a block-diagonal fall-back, a kind that was left out).
        suffix: What the name of an initializer gets where the original stays in use.
    """

    edits: tuple[Edit, ...]
    rotations: Mapping[str, Rotation]
    counts: Mapping[str, int]
    notes: tuple[str, ...]
    caches: Mapping[str, str] = field(default_factory=dict)
    suffix: str = "rotated"
    scales: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    matrices: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    centres: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """What was done, for the output's metadata: JSON types only."""
        return {
            "counts": dict(self.counts),
            "rotations": {name: rotation.to_dict() for name, rotation in self.rotations.items()},
            "caches": dict(self.caches),
            "notes": list(self.notes),
        }
