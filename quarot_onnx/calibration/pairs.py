"""Which cache output is fed back as which cache input."""

import re
from collections.abc import Sequence

import onnx_ir as ir

from quarot_onnx.calibration.inputs import TensorSpec
from quarot_onnx.graph.caches import presents


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


def _namesake(past: str) -> str:
    return re.sub(r"past(_key_values)?", "present", past, count=1)


def _joined(pasts: Sequence[str], graph: ir.Graph) -> dict[str, str]:
    """The pairs that the graph shows; of two copies of a present that of the past's name, else the nearest."""
    found = {past.name or "": [value.name or "" for value in values] for past, values in presents(graph).items()}
    return {
        past: _namesake(past) if _namesake(past) in found[past] else found[past][0] for past in pasts if past in found
    }
