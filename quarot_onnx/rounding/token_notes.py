"""What to say of the calibration tokens that a stage of Linears saw."""

from collections.abc import Iterable

from quarot_onnx.config.rounding import HessianConfig
from quarot_onnx.stages.blocks import Stage

_ROUTED = (
    "a router chooses the tokens of experts, and not the same ones once weights are rounded: what earlier weights lose "
    "is not made up for in those of experts, only what the rounding of their own inputs does"
)
_FEW_ROUTED = "some experts see few calibration tokens (more samples help), the first of them"


def token_notes(method: HessianConfig, tokens: int, stage: Stage, widest: Stage | None) -> list[str]:
    """What there is to say of a stage.

    Args:
        method: How it is rounded.
        tokens: Those that it saw.
        stage: The stage.
        widest: Of all that see as many the one with the longest rows, where this is the first stage.
    """
    found = [] if widest is None else _few(tokens, widest, method.perc_damp)
    if not stage.routed:
        return found
    linear = stage.linears[0]
    if method.needs_drift:
        found.append(_ROUTED)
    if tokens < linear.in_features:
        found.append(f"{_FEW_ROUTED}: {linear.name!r} saw {tokens}, fewer than its {linear.in_features} columns")
    return found


def told(note: str, notes: Iterable[str]) -> bool:
    """Whether a note, or one that begins like it, is among those of earlier stages."""
    return note.partition(":")[0] in {earlier.partition(":")[0] for earlier in notes}


def _few(tokens: int, widest: Stage, damping: float) -> list[str]:
    """What to say of fewer tokens than a Linear has columns, whose Hessian has not full rank."""
    linear = widest.linears[0]
    if tokens >= linear.in_features:
        return []
    note = (
        f"{tokens} calibration tokens are fewer than the {linear.in_features} columns of {linear.name!r}: its Hessian "
        f"does not have full rank, and rests on the damping of {damping:g}; more or longer samples (--calib-samples, "
        "--calib-seq-len) are likely to round better"
    )
    return [note]
