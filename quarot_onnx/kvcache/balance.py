"""Balanced keys: what makes the error of rounded keys small where queries look, in place of R3's Hadamard.

Scores are products q kᵀ, so any invertible A may stand between: (q A⁻ᵀ)(k A)ᵀ = q kᵀ. Rounding k A to few bits leaves
an error of about the size of its entries, which is seen through q A⁻ᵀ; with K = E[kᵀk], Q = E[qᵀq], and entries made
alike by a Hadamard, the error of a score is as tr(Aᵀ K A) · tr(A⁻¹ Q A⁻ᵀ). The least that any A can make of it is
(Σ √λ)², λ the eigenvalues of K Q, where R3 has tr(K) · tr(Q). With K = L Lᵀ and Lᵀ Q L = U diag(λ) Uᵀ it is reached by

    A = L⁻ᵀ U diag(λ)^(1/4) H,    A⁻ᵀ = L U diag(λ)^(-1/4) H

under which keys and queries have one and the same second moment, Hᵀ diag(√λ) H. Every KV head has its own A.

Sources: for the transform, of activations and weights there, J. Chen et al., "WUSH" (2025, arXiv:2512.00956), section
3, and M. Federici et al., "Dissecting Quantization Error" (2026, arXiv:2603.04359); per-head matrices of keys behind
RoPE, which are learned there, Y. Sun et al., "FlatQuant" (2024, arXiv:2410.09426), section 3.2.

What is added to all keys alike is added to all scores of a query, and a Softmax does not see it, so keys are rounded as
(k - c) A. c and K are the mean and the covariance of keys *weighted by attention*: an error of a score changes the
Softmax by as much as p (1 - p), its derivative, p being what the query gives the key. That weight lies on few keys, the
attention sink's above all, which the plain mean would leave far from 0, and so with a large error. Where more than
scales and masks stands between scores and Softmax (a cap, a sink's own score), c is 0.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from quarot_onnx.config.kv_cache import UNBALANCED
from quarot_onnx.errors import ModelError, first_and_more
from quarot_onnx.graph.metadata import refuse_prefixed
from quarot_onnx.hadamard.orders import largest_block, usual_block
from quarot_onnx.hadamard.rotation import Rotation
from quarot_onnx.kvcache.moments import Moments, balanceable
from quarot_onnx.rotation.edits import BalanceEdit, Plan
from quarot_onnx.sites.detect import Survey
from quarot_onnx.sites.model import Attention

Matrix = NDArray[np.float64]

_RIDGE = 1e-4
"""What is added to the diagonals, of their mean: directions that calibration hardly saw are not blown up."""


def plan_balance(
    attentions: Sequence[Attention],
    others: Sequence[str],
    moments: Mapping[str, Moments],
    *,
    halved: bool = False,
    seed: int | None = None,
) -> Plan:
    """Turn what was measured into edits.

    Args:
        attentions: From `balanceable`.
        others: From there, too.
        moments: Of the attentions, by their names.
        halved: Whether the two halves of a head are rounded on grids of their own.
        seed: Of the random Hadamards; None for plain ones.
    """
    edits = [
        _edit(attention, moments[attention.name], _mixing(attention.head_dim, seed, halved=halved))
        for attention in attentions
    ]
    caches = {edit.attention.key_cache: edit for edit in edits if edit.attention.key_cache is not None}
    notes = (f"keys are not balanced at {first_and_more(others)}, nor rotated (R3)",) if others else ()
    return Plan(
        tuple(edits),
        {},
        {"places": len(edits)},
        notes,
        dict.fromkeys(caches, "balances"),
        suffix="balanced",
        matrices={name: edit.keys for name, edit in caches.items()},
        centres={name: edit.centres for name, edit in caches.items() if edit.centres is not None},
    )


def require_balanceable(survey: Survey) -> None:
    """Refuse a model whose keys cannot be balanced.

    Raises:
        ModelError: The heads of no attention can be told apart behind RoPE, or it has a prefix.
    """
    refuse_prefixed(survey.model, "balanced")
    attentions, others = balanceable(survey)
    if not attentions:
        raise ModelError(
            f"{first_and_more(others)}: keys cannot be balanced, as their heads are not to be told apart behind RoPE; "
            f"{UNBALANCED}"
        )


def _mixing(head_dim: int, seed: int | None, *, halved: bool) -> Rotation:
    """H, of a head or of its halves."""
    block = largest_block(head_dim // 2) if halved else usual_block(head_dim)
    return Rotation.hadamard(head_dim, seed=seed, block_size=block)


def _edit(attention: Attention, moments: Moments, mixing: Rotation) -> BalanceEdit:
    heads, head_dim, _ = moments.keys.shape
    own = moments.queries.reshape(heads, -1, head_dim, head_dim).mean(axis=1)
    pairs = [balanced(k, q, mixing) for k, q in zip(moments.keys, own, strict=True)]
    queries, keys = (np.stack(side) for side in zip(*pairs, strict=True))
    return BalanceEdit(attention, np.repeat(queries, len(moments.queries) // heads, axis=0), keys, moments.centres)


def balanced(keys: Matrix, queries: Matrix, mixing: Rotation) -> tuple[Matrix, Matrix]:
    """The matrices of one KV head.

    Args:
        keys: K, [head_dim, head_dim].
        queries: Q, the same over the tokens of all query heads that read the head.
        mixing: H, of size head_dim.

    Returns:
        A⁻ᵀ, for queries, and A, for keys; (A⁻ᵀ) Aᵀ = I.
    """
    from scipy.linalg import solve_triangular  # noqa: PLC0415 - a fifth of a second that most runs can do without

    low = np.linalg.cholesky(_raised(keys))
    rising, vectors = np.linalg.eigh(low.T @ _raised(queries) @ low)
    values, vectors = rising[::-1], vectors[:, ::-1]
    root = np.maximum(values, np.finfo(np.float64).tiny) ** 0.25
    for_keys = solve_triangular(low, vectors * root, lower=True, trans="T")
    return mixing.apply((low @ vectors) / root, 1), mixing.apply(for_keys, 1)


def _raised(moments: Matrix) -> Matrix:
    """Second moments of a mean of 1 on the diagonal, with the ridge; the identity where there are none."""
    mean = np.trace(moments) / len(moments)
    unit = np.eye(len(moments))
    return unit if mean <= 0 else np.asarray(moments / mean + _RIDGE * unit)
