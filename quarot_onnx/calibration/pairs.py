"""Which cache output is fed back as which cache input."""

import re
from collections.abc import Sequence

import onnx_ir as ir

from quarot_onnx.calibration.inputs import TensorSpec
from quarot_onnx.errors import FeedError
from quarot_onnx.graph.caches import presents

_AXES = 4


def pair_presents(
    pasts: Sequence[TensorSpec], outputs: Sequence[TensorSpec], graph: ir.Graph
) -> tuple[tuple[str, str], ...]:
    """Past inputs with their present outputs.

    They belong together as the graph joins them. Where it joins them in a way that is not understood, names decide if
    every name answers, else the order.

    Args:
        pasts: The cache inputs.
        outputs: All outputs.
        graph: The graph.

    Returns:
        Pairs in the order of ``pasts``. Empty where a past has no present: another graph makes it, so that this one
        cannot be decoded with alone.
    """
    pairs = _joined([spec.name for spec in pasts], graph)
    rest = [spec.name for spec in pasts if spec.name not in pairs]
    names = [spec.name for spec in outputs if spec.name not in pairs.values()]
    ranked = [spec.name for spec in outputs if spec.name in names and spec.rank == 4]
    if all(_namesake(past) in names and _namesake(past) != past for past in rest):
        pairs |= {past: _namesake(past) for past in rest}
    elif len(ranked) == len(rest):
        pairs |= dict(zip(rest, ranked, strict=True))
    else:
        return ()
    return tuple((spec.name, pairs[spec.name]) for spec in pasts)


def check_layout(pairs: Sequence[tuple[str, str]], pasts: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Refuse caches of four axes whose positions are not on axis 2: there a past and its present are of one length.

    Args:
        pairs: Past inputs with their present outputs.
        pasts: The cache inputs.
        outputs: All outputs.

    Raises:
        FeedError: There is one.
    """
    shapes = {spec.name: spec.shape for spec in (*pasts, *outputs)}
    for past, present in pairs:
        before, after = shapes[past] or (), shapes[present] or ()
        if len(before) != _AXES or len(after) != _AXES or not isinstance(before[2], int) or before[2] != after[2]:
            continue
        grown = [axis for axis in (1, 3) if _differ(before[axis], after[axis])]
        if grown:
            raise FeedError(
                f"the cache {past!r} {list(before)} has its positions on axis {grown[0]}, and only caches "
                "[batch, KV heads, positions, head_dim] can be fed: export it with such"
            )


def _differ(before: int | str | None, after: int | str | None) -> bool:
    """Whether both lengths are stated in one way, and are not the same."""
    return before != after and None not in (before, after) and isinstance(before, int) == isinstance(after, int)


def _namesake(past: str) -> str:
    return re.sub(r"past(_key_values)?", "present", past, count=1)


def _joined(pasts: Sequence[str], graph: ir.Graph) -> dict[str, str]:
    """The pairs that the graph shows; of two copies of a present that of the past's name, else the nearest."""
    found = {past.name or "": [value.name or "" for value in values] for past, values in presents(graph).items()}
    return {
        past: _namesake(past) if _namesake(past) in found[past] else found[past][0] for past in pasts if past in found
    }
