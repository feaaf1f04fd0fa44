"""What the user wants rotated, and how."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.sites.model import Kind


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
