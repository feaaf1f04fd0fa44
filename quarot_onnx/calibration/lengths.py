"""The lengths that a graph fixes, and the arrays of the lengths that are fed.

A run feeds ``seq`` new tokens on top of ``past`` ones. Static exports fix the batch, ``seq`` (1 in graphs that only
decode), the columns of the cache, or the columns of the mask. A cache of fixed length is joined to what is new, which
then stands at its end, or it is written in place, from its beginning; the columns not yet used are hidden by the mask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from quarot_onnx.calibration.inputs import InputRole, TensorSpec, position_axis
from quarot_onnx.calibration.traced import is_joined

EMBEDDINGS = 256
"""Different embeddings that are drawn for graphs without an embedding table."""

_LOWEST = {ir.DataType.FLOAT16: -1e4}
"""What is added to hide a position: far below any score, and no infinity once scores are added to it."""

FIXED = ("batch", "seq", "past", "total")
"""The lengths of `Lengths`."""

_MAIN = frozenset({InputRole.TOKENS, InputRole.EMBEDDINGS})


@dataclass(frozen=True)
class Lengths:
    """What a graph fixes; None where it leaves a length free.

    Attributes:
        batch: Rows.
        seq: New tokens of a run.
        past: Columns of the cache inputs; 0 for a cache that cannot be continued.
        total: Columns of the masks.
        in_place: The cache has its columns before and after a run.
    """

    batch: int | None = None
    seq: int | None = None
    past: int | None = None
    total: int | None = None
    in_place: bool = False

    @classmethod
    def read(
        cls,
        inputs: Sequence[TensorSpec],
        roles: Mapping[str, InputRole],
        outputs: Sequence[TensorSpec],
        graph: ir.Graph,
    ) -> "Lengths":
        """Read them off the declared shapes of inputs."""

        def fixed(kinds: frozenset[InputRole], axis: int, least_rank: int = 1) -> int | None:
            found = (
                spec.shape[axis]
                for spec in inputs
                if roles[spec.name] in kinds and spec.shape is not None and len(spec.shape) >= least_rank
            )
            return next((length for length in found if isinstance(length, int)), None)

        caches = frozenset({InputRole.PAST})
        masks = frozenset({InputRole.MASK, InputRole.BIAS})
        batch = fixed(_MAIN | caches, 0)
        total, past = fixed(masks, -1, 2), _columns(inputs, roles)
        seq = fixed(_MAIN, 1)
        seq = fixed(frozenset({InputRole.POSITIONS}), -1) if seq is None else seq
        has_cache = InputRole.PAST in roles.values()
        if total is not None and past is None and has_cache and seq is not None:
            past = max(total - seq, 0)
        if total is not None and seq is None and past is None:
            seq, past = total, 0 if has_cache else None  # the mask leaves no room for decoding
        return cls(batch, seq, past, total, in_place=_in_place(inputs, roles, outputs, graph))

    def beside(self, other: "Lengths") -> "Lengths":
        """What a graph is fed beside another one: what that one alone fixes, too."""
        fixed = {
            name: theirs if own is None else own
            for name, own, theirs in ((name, getattr(self, name), getattr(other, name)) for name in FIXED)
        }
        return Lengths(**fixed, in_place=other.in_place if self.past is None else self.in_place)


def _columns(inputs: Sequence[TensorSpec], roles: Mapping[str, InputRole]) -> int | None:
    """The columns of the caches, None where they are free."""
    shapes = [spec.shape for spec in inputs if roles[spec.name] is InputRole.PAST and spec.shape is not None]
    return next((length for shape in shapes if isinstance(length := shape[position_axis(shape)], int)), None)


def _in_place(
    inputs: Sequence[TensorSpec],
    roles: Mapping[str, InputRole],
    outputs: Sequence[TensorSpec],
    graph: ir.Graph,
) -> bool:
    """Whether a cache of fixed length is written in place: by what reads it, else by the outputs' shapes."""
    past = next((spec for spec in inputs if roles[spec.name] is InputRole.PAST), None)
    if past is None or past.shape is None or not isinstance(past.shape[position_axis(past.shape)], int):
        return False
    joined = is_joined(next(value for value in graph.inputs if value.name == past.name))
    if joined is not None:
        return not joined
    return any(spec.rank == past.rank and spec.shape == past.shape for spec in outputs)


@dataclass(frozen=True)
class Filling:
    """How far the inputs of one run are filled.

    Attributes:
        batch: Rows.
        seq: New tokens.
        past: Tokens before them that count.
        held: Columns of the cache inputs.
        columns: Columns of the masks.
        first: The mask's column of the first token that counts.
    """

    batch: int
    seq: int
    past: int
    held: int
    columns: int
    first: int

    @classmethod
    def of(cls, lengths: Lengths, batch: int, seq: int, past: int) -> "Filling":
        """The filling of a run of ``seq`` tokens after ``past`` ones."""
        held = past if lengths.past is None else lengths.past
        at_end = not lengths.in_place and lengths.total in (None, held + seq)
        if at_end:
            return cls(batch, seq, min(past, held), held, held + seq, max(held - past, 0))
        return cls(batch, seq, past, held, past + seq if lengths.total is None else lengths.total, 0)

    def visible(self) -> npt.NDArray[np.bool_]:
        """Which columns each new token sees: [seq, columns], causal."""
        keys = np.arange(self.columns) - self.first
        queries = self.past + np.arange(self.seq)
        return (keys >= 0) & (keys <= queries[:, None])


def repeated(array: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """An array of so many rows: its own, from the first one again where it has fewer."""
    return array if len(array) >= rows else np.resize(array, (rows, *array.shape[1:]))


def made(spec: TensorSpec, role: InputRole, filling: Filling, start: int) -> npt.NDArray[Any]:
    """The array of an input that lengths alone decide, in any integer or float type.

    Args:
        spec: The input.
        role: ``MASK``, ``BIAS``, ``POSITIONS``, ``UNREAD`` or one of the lengths.
        filling: The lengths.
        start: The position of the first new token.
    """
    shape = spec.shape or ()
    if role is InputRole.UNREAD:
        free = {0: filling.batch, 1: filling.seq}
        return np.zeros([dim if isinstance(dim, int) else free.get(axis, 1) for axis, dim in enumerate(shape)])
    if role in (InputRole.MASK, InputRole.BIAS):
        seen = filling.visible()
        if len(shape) == 2 or shape[-2] == 1:
            seen = seen[-1:]
        array = np.where(seen, 0.0, _LOWEST.get(spec.dtype, -1e9)) if role is InputRole.BIAS else seen
        if len(shape) == 2:
            array = array[0]
        middle = [dim if isinstance(dim, int) else 1 for dim in shape[1:-2]]
        rows = [shape[0] if isinstance(shape[0], int) else filling.batch]
        return np.broadcast_to(array, (*rows, *middle, *array.shape[-(2 if len(shape) > 2 else 1) :]))
    if role is InputRole.POSITIONS:
        positions = np.arange(start, start + filling.seq)
        if len(shape) == 1:
            return positions
        rows = [shape[-2] if isinstance(shape[-2], int) else filling.batch]
        return np.tile(positions, (*(dim if isinstance(dim, int) else 3 for dim in shape[:-2]), *rows, 1))
    number = {
        InputRole.KEPT: filling.seq,
        InputRole.PAST_LENGTH: start,
        InputRole.TOTAL_LENGTH: start + filling.seq,
        InputRole.LAST_POSITION: start + filling.seq - 1,
    }[role]
    return np.full([dim if isinstance(dim, int) else filling.batch for dim in shape], number)


@lru_cache(maxsize=2)
def embedding_table(width: int) -> npt.NDArray[np.float32]:
    """Embeddings that are fed where a graph takes them in place of ids, [EMBEDDINGS, width]."""
    return np.random.default_rng(0).standard_normal((EMBEDDINGS, width), np.float32)
