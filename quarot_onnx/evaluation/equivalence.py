"""Proof that two models compute the same: their outputs on the same tokens.

Rotations change no output but for rounding, so the measure is rounding noise. Both models see the same random ids and,
where a tokenizer lies beside the first, the same real text: prefills, then decode steps, each on its own cache. Where
no rule can make a graph's inputs, the user gives them. The models run one after the other; the first one's outputs wait
in a file. ``pairing`` says what is compared beside the logits.

Two figures decide: the largest difference relative to the largest logit, which finds a single wrong position, and the
relative L2 error ``|b - a| / |a|``, which averages over millions of logits and so stands close above the noise. Both
are taken of every output by itself. Where one is above what the dtype allows, ``noise`` finds out how far rounding
alone moves the original on these inputs, and that counts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import onnx_ir as ir

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.leading import Lead
from quarot_onnx.calibration.roles import is_decoder
from quarot_onnx.calibration.text import TokenIds
from quarot_onnx.errors import VerificationError
from quarot_onnx.evaluation.measuring import Figures, Measured
from quarot_onnx.evaluation.noise import OwnNoise, own_noise
from quarot_onnx.evaluation.sides import Sides, Tokens, alike, of_others, on_feeds, on_tokens
from quarot_onnx.evaluation.tolerance import TOLERANCES, Tolerance, coarser, coarsest, weight_type
from quarot_onnx.io import model_io
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.piecewise.runs import Model, opened

__all__ = ["Equivalence", "OutputDifference", "Tolerance", "compare", "is_decoder", "require"]


@dataclass(frozen=True)
class OutputDifference:
    """How far one output of two models is apart.

    Attributes:
        name: The output, in the first model.
        up_to: What was undone or not told apart before they were compared, in words; empty for nothing.
        max_abs: ``max |b - a|``.
        max_rel: ``max |b - a| / max |a|``.
        rel_l2: ``|b - a| / |a|``.
        passed: Whether both relative figures lie within the tolerance.
    """

    name: str
    up_to: str
    max_abs: float
    max_rel: float
    rel_l2: float
    passed: bool


@dataclass(frozen=True)
class Equivalence:
    """How far two models' outputs are apart, over all compared positions.

    Attributes:
        max_abs_logit_diff: ``max |b - a|``.
        max_rel_logit_diff: ``max |b - a| / max |a|``.
        rel_l2: ``|b - a| / |a|`` over all logits.
        kl: Mean of ``KL(a || b)`` in nats; None for graphs that are no decoders.
        top1_agreement: Share of positions with the same argmax. A flip counts as agreement where a's own logits of the
            two tokens are closer than twice the ``max_rel`` that the dtype's rounding explains. None for no decoders.
        tokens: Positions compared, decode steps among them; rows for graphs that are no decoders.
        decode_steps: Decode steps among them.
        dtype: The less precise of the two models' weight types; it chose the tolerance if none was given.
        tolerance: The tolerance used.
        passed: Whether everything lies within it, every output that was compared among it.
        outputs: Every output that was compared; of a decoder the logits first.
        not_compared: Float outputs that were not, with the reason.
        own_noise: ``max_rel_logit_diff`` of the first model from itself, its vectors of weights moved by a rounding;
            None where that was not asked. ``tolerance`` leaves room for it.
    """

    max_abs_logit_diff: float
    max_rel_logit_diff: float
    rel_l2: float
    kl: float | None
    top1_agreement: float | None
    tokens: int
    decode_steps: int
    dtype: ir.DataType
    tolerance: Tolerance
    passed: bool
    outputs: tuple[OutputDifference, ...] = ()
    not_compared: Mapping[str, str] = field(default_factory=dict)
    own_noise: float | None = None


def compare(
    path_a: str | Path,
    path_b: str | Path,
    *,
    token_ids: TokenIds | None = None,
    feeds: Sequence[Feeds] | None = None,
    own_feeds: Sequence[Feeds] | None = None,
    random_tokens: int = 64,
    real_tokens: int = 64,
    seq_len: int = 32,
    decode_steps: int = 2,
    seed: int = 0,
    tolerance: Tolerance | None = None,
    threads: int | None = None,
    then: Callable[[Model], None] | None = None,
    lead: Lead | None = None,
    memory: Memory | None = None,
    model_b: ir.Model | None = None,
) -> Equivalence:
    """Compare two models.

    Where one of them holds a prefix, the other one is fed it.

    Args:
        path_a: The original.
        path_b: The other one.
        token_ids: Token ids of your own in place of the real text, ``[windows, seq]``; their last ``decode_steps``
            are decoded one by one.
        feeds: Inputs of your own in place of all that, each one run; see ``calibration.given.given_feeds``.
        own_feeds: The same with the caches of ``path_b``; None makes them of ``feeds`` as the models' records say.
        random_tokens: Prefill tokens of random ids, rounded up to whole windows; 0 for none.
        real_tokens: Prefill tokens of real text, if a tokenizer.json lies beside ``path_a``; 0 for none.
        seq_len: Prefill tokens of a window; a graph that fixes a length gets that.
        decode_steps: Tokens decoded after every prefill, if both graphs have a cache.
        seed: Of the random ids, and of the random inputs of graphs that are no decoders.
        tolerance: What may differ; None for what the dtype allows.
        threads: onnxruntime's intra-op threads.
        then: Called with ``path_a``'s model after its last run; not where ``feeds`` are given.
        lead: The prefix of ``path_b``, where the file that holds it does not lie beside it.
        memory: How the models are run; None: whole where they fit into what the machine has.
        model_b: What was loaded of ``path_b``, where it was.

    Raises:
        FeedError: An input is not known, or onnxruntime cannot run the inputs that were made.
        ModelError: A model cannot be run, the two have different vocabularies or inputs, or ``path_a``'s own outputs
            are not finite.
        CalibrationError: Token ids that do not fit, or nothing to compare on.
    """
    memory = memory or Memory()
    models = model_io.load(path_a), model_io.load(path_b) if model_b is None else model_b
    of_a, of_b = (partial(_opening, path, memory, threads) for path in (path_a, path_b))
    dtype = coarsest(*map(weight_type, models))
    if not all(map(is_decoder, models)):
        sides = of_others((path_a, path_b), models, feeds, seed)
    else:
        a, b = alike(path_a, path_b, models, known=feeds is None)
        if feeds is None:
            tokens = Tokens(token_ids, random_tokens, real_tokens, seq_len, decode_steps, seed)
            sides = on_tokens(a, models, b, tokens, lead=lead)
        else:
            sides = on_feeds(a, models, b, feeds, own_feeds)
    found = sides.measured(of_a(models[0]), of_b(models[1]), then)
    result = _judged(found, sides, dtype, tolerance)
    if result.passed or tolerance is not None:
        return result
    most = {name: OwnNoise(1.0) for name in ("", *(item.compared.name for item in found.outputs))}
    if not _judged(found, sides, dtype, None, most).passed:
        return result  # whatever rounding does
    noise = own_noise(path_a, models[0], sides, of_a, dtype)
    return result if noise is None else _judged(found, sides, dtype, None, noise)


def _opening(path: str | Path, memory: Memory, threads: int | None, model: ir.Model) -> Callable[[], Model]:
    """What opens a model that is like the one of a file."""
    return partial(opened, path, memory, model=model, threads=threads, low_memory=True)


def _judged(
    found: Figures,
    sides: Sides,
    dtype: ir.DataType,
    tolerance: Tolerance | None,
    noise: Mapping[str, OwnNoise] | None = None,
) -> Equivalence:
    """The figures, judged."""

    def limits_of(name: str, kind: ir.DataType) -> Tolerance:
        limits = tolerance or TOLERANCES[kind]
        return limits if noise is None or name not in noise else noise[name].widened(limits)

    decoder, measures, limits = sides.decoder, found.main, limits_of("", dtype)
    top1 = measures.top1_agreement(2 * TOLERANCES[dtype].max_rel * measures.largest) if decoder else None
    outputs = tuple(_difference(item, limits_of(item.compared.name, _kind(item, dtype))) for item in found.outputs)
    return Equivalence(
        max_abs_logit_diff=measures.max_abs,
        max_rel_logit_diff=measures.max_rel,
        rel_l2=measures.rel_l2,
        kl=measures.kl if decoder else None,
        top1_agreement=top1,
        tokens=measures.rows,
        decode_steps=sides.decoded,
        dtype=dtype,
        tolerance=limits,
        passed=measures.max_rel <= limits.max_rel
        and measures.rel_l2 <= limits.rel_l2
        and (top1 is None or top1 >= limits.top1)
        and all(output.passed for output in outputs),
        outputs=outputs,
        not_compared=sides.pairing.left | found.left,
        own_noise=None if noise is None else noise[""].max_rel,
    )


def _kind(item: Measured, dtype: ir.DataType) -> ir.DataType:
    """The type that an output is judged by; the logits' own is left out of it, any other may be rounded further."""
    return dtype if item.main else coarser(dtype, item.dtype)


def _difference(item: Measured, limits: Tolerance) -> OutputDifference:
    """The figures of one output, judged."""
    figures = item.measures
    passed = figures.max_rel <= limits.max_rel and figures.rel_l2 <= limits.rel_l2
    return OutputDifference(
        item.compared.name, item.compared.up_to, figures.max_abs, figures.max_rel, figures.rel_l2, passed
    )


def require(equivalence: Equivalence) -> None:
    """Stop if a comparison did not pass.

    Raises:
        VerificationError: It did not; the message has the figures.
    """
    if equivalence.passed:
        return
    limits = equivalence.tolerance
    figures = [
        f"max |Δlogit| {equivalence.max_abs_logit_diff:.3g}",
        f"relative {equivalence.max_rel_logit_diff:.3g} (allowed {limits.max_rel:.3g})",
        f"relative L2 {equivalence.rel_l2:.3g} (allowed {limits.rel_l2:.3g})",
    ]
    if equivalence.top1_agreement is not None:
        figures.append(f"top-1 agreement {equivalence.top1_agreement:.4f} (required {limits.top1:.4f})")
    if equivalence.kl is not None:
        figures.append(f"KL {equivalence.kl:.3g} nats")
    if equivalence.own_noise is not None:
        figures.append(f"rounding alone moves the original by {equivalence.own_noise:.3g}")
    figures += [
        f"output {output.name!r} relative {output.max_rel:.3g}, relative L2 {output.rel_l2:.3g}"
        for output in equivalence.outputs
        if not output.passed
    ]
    raise VerificationError(
        f"the models differ by more than rounding explains ({equivalence.dtype.name.lower()} weights) over "
        f"{equivalence.tokens} tokens: " + ", ".join(figures)
    )
