"""Pasts that are fed to a changed model, made into what its own caches hold.

R3 rotates the heads of K, R2 those of V, SmoothQuant scales V, and balancing centres and multiplies K. With x a head of
a cache,

    x ← x R    or    x ← x / s    or    x ← (x − c) A

A past that the model made before it was changed (pieces of a window that a graph of fixed length runs one after the
other, a user's own feeds) is changed alike; as it is, attention would read two bases at once.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.roles import is_decoder
from quarot_onnx.errors import CalibrationError
from quarot_onnx.evaluation.given import turned_heads
from quarot_onnx.rotation.edits import Plan
from quarot_onnx.sites.model import HEADS_APART, HEADS_PACKED

PastChange = Callable[[Feeds], Feeds]
"""Feeds of a model as it was to feeds of what it has become."""


def past_change(plan: Plan, model: ir.Model) -> PastChange | None:
    """What a plan makes of the pasts that are fed.

    Args:
        plan: Of a rotation or a smoothing.
        model: The model, changed or not: its inputs and outputs are the same.

    Returns:
        None where no cache changes. The function raises CalibrationError for a past of which it is not known what it
        becomes: of integers, or of other axes.
    """
    if not plan.caches or not is_decoder(model):
        return None
    pairs = ModelInputs.from_model(model, known=False).presents
    changed = {past: present for past, present in pairs if present in plan.caches}

    def change(feeds: Feeds) -> Feeds:
        pasts = [name for name in changed if name in feeds and feeds[name].any()]
        return {**feeds, **{name: _changed(plan, name, feeds[name], changed[name]) for name in pasts}}

    return change


def _changed(plan: Plan, name: str, past: NDArray[Any], present: str) -> NDArray[Any]:
    rotation, factor = plan.rotations.get(plan.caches[present]), plan.scales.get(present)
    if np.issubdtype(past.dtype, np.floating):
        if rotation is not None and past.shape[-1] % rotation.size == 0:
            return turned_heads(past, rotation)
        if factor is not None and (spread := _spread(factor, past.shape)) is not None:
            return np.asarray(past * spread, past.dtype)
        matrices = plan.matrices.get(present)
        if matrices is not None and past.ndim == HEADS_APART and past.shape[1] == len(matrices):
            centres = plan.centres.get(present)
            return np.asarray((past if centres is None else past - centres[:, None]) @ matrices, past.dtype)
    what = f"rotates ({plan.caches[present]})" if rotation is not None else plan.caches[present]
    raise CalibrationError(
        f"a sample brings the past {name!r} ({past.dtype} {list(past.shape)}), whose values this run {what}; what they "
        "become is known of float caches [batch, heads, positions, head_dim] alone: feed samples without a past, or "
        "leave out what changes the cache"
    )


def _spread(factor: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    """Factors [KV heads, head_dim] along the axes of a cache; None where these are others."""
    groups, width = factor.shape
    if len(shape) == HEADS_PACKED and shape[-1] == factor.size:
        return factor.reshape(-1)
    if len(shape) != HEADS_APART or shape[1] % groups or shape[-1] != width:
        return None
    # A cache may hold KV heads once for each query head.
    return np.repeat(factor, shape[1] // groups, axis=0)[:, None]
