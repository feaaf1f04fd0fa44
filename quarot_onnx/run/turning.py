"""The rotation of a run: what is left to do, the edits of the graph, and the proof that nothing else changed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.leading import Lead
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import QuarotConfig, SmoothQuantConfig
from quarot_onnx.config.choices import PrefixForm
from quarot_onnx.errors import ConfigError, FeedError, ModelError, VerificationError
from quarot_onnx.evaluation.equivalence import Equivalence, compare, require
from quarot_onnx.graph.metadata import prefix_of, refuse_prefixed
from quarot_onnx.io.spellings import weights_with_default
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.piecewise.runs import Model
from quarot_onnx.progress import PhaseProgress
from quarot_onnx.quantization.select import Selection
from quarot_onnx.rotation.apply import apply_plan
from quarot_onnx.rotation.plan import Plan, plan_rotation
from quarot_onnx.run.intent import kinds_for, needless_r4, sites_and_request
from quarot_onnx.run.marked import refuse_lost_marks
from quarot_onnx.run.prefixing import window_note
from quarot_onnx.run.provenance import is_rotated, recorded, refuse_other_rotation, summary
from quarot_onnx.sites.detect import Survey
from quarot_onnx.sites.integer_caches import refuse_integer_cache
from quarot_onnx.sites.model import Kind

_WITHOUT = "quantize its weights without rotation (--no-rotate; in Python no QuarotConfig in algo_config)"


def still_to_rotate(model: ir.Model, config: QConfig) -> QuarotConfig | None:
    """The rotation that is left to do: none where the model brings what the configuration asks for.

    Raises:
        ConfigError: The model was rotated in another way than the configuration says.
        ModelError: It is to be rotated, or smoothed, and its cache is of integers; or it was rotated online, and the
            places are not found.
    """
    earlier = recorded(model)
    if earlier is not None and is_rotated(earlier):
        refuse_lost_marks(model.graph, earlier)
    if any(isinstance(item, SmoothQuantConfig) for item in config.algo_config):
        refuse_integer_cache(model.graph, "smoothed", "leave out SmoothQuant (--smooth-alpha)")
    if config.quarot is not None and not is_rotated(earlier):
        refuse_integer_cache(model.graph, "rotated", _WITHOUT)
    if config.quarot is None or earlier is None or not is_rotated(earlier):
        return config.quarot
    refuse_other_rotation(earlier, config.quarot)
    return None


def rotate_in_place(
    survey: Survey,
    config: QuarotConfig,
    default: frozenset[Kind],
    needless: Mapping[ir.Node, str] | None = None,
    *,
    alone: bool = True,
    without: str = "",
) -> Plan:
    """Plan and edit the graph, after which the survey is out of date; weights follow when the model is written.

    Args:
        survey: The float model.
        config: Which rotations.
        default: Those that are done where possible when nothing speaks of them.
        needless: Linears before which R4 does not pay, with the reason.
        alone: Whether there must be a rotation, as nothing else changes keys and weights.
        without: How to go on where there is none, for the message.

    Raises:
        ConfigError: A rotation that is asked for is impossible; or there is none.
        ModelError: The model is rotated already, has a prefix, or is no decoder.
    """
    model = survey.model
    refuse_prefixed(model, "rotated")
    refuse_integer_cache(model.graph, "rotated", _WITHOUT)
    earlier = recorded(model)
    if earlier is not None and is_rotated(earlier):
        raise ModelError(
            f"the model is already rotated ({summary(earlier)}); start from the original, or quantize this one, which "
            "rotates nothing anew"
        )
    sites, request, notes = sites_and_request(survey, config, default, needless)
    if not sites.layers and not sites.online_pairs:
        raise ModelError(
            "the graph is not a decoder (no attention with a residual stream was found) and no online_pairs are named: "
            "there is nothing to rotate; name nodes in a rotation config's online_pairs, or go without rotation"
            f"{weights_with_default(model.graph)}"
        )
    plan = plan_rotation(sites, request)
    plan = replace(plan, notes=(*notes, *plan.notes))
    if alone and not plan.edits:
        firsts = {note.split(" ", 1)[0]: note for note in reversed(plan.notes)}  # of each rotation
        why = f": {'; '.join(reversed(firsts.values()))}" if firsts else "; switch on at least one of R1 to R4"
        raise ConfigError(f"no rotation is left to do{why}{without}")
    apply_plan(model, plan, survey.shapes)
    return plan


def turn(
    selection: Selection, config: QConfig, rotating: QuarotConfig
) -> tuple[tuple[Plan, QuarotConfig] | None, tuple[str, ...]]:
    """Rotate what is to be quantized, in place, where the configuration asks for it or the graph allows it.

    Args:
        selection: What is quantized.
        config: What is asked for.
        rotating: The rotation that is left to do.

    Returns:
        What was done and what was asked for, None where no place of the graph allows any rotation and none was named;
        and what to say of that.

    Raises:
        ConfigError: A rotation that is asked for is impossible.
        ModelError: The model is rotated already, has a prefix, or is no decoder.
    """
    needless, wanted = needless_r4(selection, config), config.balances_keys or rotating.leaves_open
    plan = rotate_in_place(
        selection.survey, rotating, kinds_for(config), needless, alone=not wanted, without=f", or {_WITHOUT}"
    )
    if plan.edits or config.balances_keys:
        return (plan, rotating), ()
    return None, ("not rotated, as no place of the graph allows it", *plan.notes)


def prove(
    source: str | Path,
    rotated: str | Path,
    feeds: Sequence[Feeds] | None,
    progress: PhaseProgress,
    *,
    own_feeds: Sequence[Feeds] | None = None,
    then: Callable[[Model], None] | None = None,
    lead: Lead | None = None,
    memory: Memory | None = None,
    model: ir.Model | None = None,
) -> Equivalence:
    """Compare the two; raises VerificationError when they differ. Options are as for ``compare``."""
    progress("verify", 0, None)
    try:
        equivalence = compare(
            source, rotated, feeds=feeds, own_feeds=own_feeds, then=then, lead=lead, memory=memory, model_b=model
        )
    except FeedError as error:
        what = "give other inputs" if feeds is not None else "give inputs for the proof"
        raise FeedError(
            error.reason, f"{what} (--feeds FILE.npz, feeds=), or go without it (--no-verify, verify=False)"
        ) from error
    try:
        require(equivalence)
    except VerificationError as error:
        held = None if model is None else prefix_of(recorded(model))
        notes = () if model is None or held is None else window_note(model, PrefixForm(held[0]), Path(source).parent)
        raise VerificationError("; ".join((str(error), *notes))) from error
    progress("verify", 1, 1)
    return equivalence
