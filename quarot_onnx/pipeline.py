"""The way of a model through the house: load, find the sites, rotate, prove, calibrate, quantize, save.

``rotate`` and ``quantize`` read like these lines. Both leave the input as it is and write the output whole or not
at all. Where the rotated float model is needed as a file (to prove it, to calibrate on it), it is written to a
scratch folder beside the output, which is removed again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from quarot_onnx import model_io
from quarot_onnx.calibration.bos import BosChoice
from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.given import FeedsSource, given_feeds
from quarot_onnx.calibration.readers import DataReader, wrap
from quarot_onnx.errors import ConfigError, FeedError, ModelError
from quarot_onnx.evaluation.equivalence import Equivalence, compare, require
from quarot_onnx.evaluation.report import equivalence_record
from quarot_onnx.intent import kinds_for, needless_notes, quantized_inputs, sites_and_request
from quarot_onnx.model_io import SavedModel
from quarot_onnx.provenance import (
    RECIPE_KEY,
    Recipe,
    is_rotated,
    make_recipe,
    record,
    recorded,
    refuse_other_rotation,
    refuse_quantized,
    rotation_notes,
    summary,
)
from quarot_onnx.quantization import lowbit, static_ranges
from quarot_onnx.quantization.apply import GivenWeights, apply_selection
from quarot_onnx.quantization.config import QConfig
from quarot_onnx.quantization.config.algorithm import QuarotConfig
from quarot_onnx.quantization.left_float import left_in_float
from quarot_onnx.quantization.select import select
from quarot_onnx.rotation.apply import apply_plan
from quarot_onnx.rotation.plan import Plan, plan_rotation
from quarot_onnx.sites.model import Kind
from quarot_onnx.spellings import weights_with_default
from quarot_onnx.workspace import Clock, scratch_folder, workspace

__all__ = ["RECIPE_KEY", "Outcome", "Progress", "quantize", "recorded", "rotate"]

Progress = Callable[[str, int, int | None], None]
"""Called with the phase ("rotate", "verify", "calibrate", ...), what is done of it, and of how much."""


def _silent(_phase: str, _done: int, _total: int | None) -> None:
    """The progress of a caller who does not care."""


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        saved: The files written.
        recipe: What was done, as recorded in the output.
        equivalence: The proof that the rotation changed nothing; None without rotation or with verification off.
        notes: What the user should know.
        seconds: Time of each phase.
        bos: What stood in front of every window of calibration text, and why; None where none was read.
    """

    saved: SavedModel
    recipe: Recipe
    equivalence: Equivalence | None
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    bos: BosChoice | None = None


def rotate(
    source: str | Path,
    target: str | Path,
    config: QuarotConfig,
    *,
    verify: bool = True,
    feeds: FeedsSource | None = None,
    overwrite: bool | None = None,
    progress: Progress = _silent,
) -> Outcome:
    """Rotate a float model.

    R1, R2 and R4 are done where the model allows it, R3 when it is asked for.

    Args:
        source: The .onnx file.
        target: The .onnx file to write; the source's companion files are copied beside it.
        config: Which rotations.
        verify: Prove that the rotated model computes the same.
        feeds: Inputs to prove it on, for graphs that no rule can feed: an .npz file, a folder of them, or arrays.
        overwrite: Whether existing files may be replaced; None: the target that was named, and what an earlier run to
            it wrote beside it.
        progress: Called as the work goes on.

    Returns:
        What was done.

    Raises:
        InputError: The model, the configuration or the target is at fault.
        VerificationError: The rotated model does not compute the same; nothing is written.
    """
    clock = Clock()
    model = model_io.load(source)
    folder = Path(source).absolute().parent
    model_io.check_target(model, target, overwrite=overwrite)
    refuse_quantized(recorded(model))
    given = None if feeds is None else given_feeds(feeds, model)
    plan = _rotate_in_place(model, config, frozenset({Kind.R1, Kind.R2, Kind.R4}))
    model_io.check_target(model, target, overwrite=overwrite, companions_from=folder)
    recipe = make_recipe(rotation=(plan, config))
    record(model, recipe)
    report, protected = dict(recipe), model_io.input_files(model)
    equivalence: Equivalence | None = None
    clock.lap("plan")
    with scratch_folder(Path(target)) as scratch:
        file = scratch / "rotated.onnx"
        if verify:
            model_io.save(model, file, progress=_phase(progress, "rotate"))
            clock.lap("rotate")
            equivalence = _prove(source, file, given, progress)
            clock.lap("verify")
            report["equivalence"] = equivalence_record(equivalence)
            # What is written is what was proved.
            model = model_io.load(file)
        saved = model_io.save(
            model,
            target,
            overwrite=overwrite,
            progress=_phase(progress, "save"),
            companions_from=folder,
            report=report,
            forbid=protected,
        )
        clock.lap("save")
    return Outcome(saved, recipe, equivalence, (*config.notes, *plan.notes), clock.laps)


def quantize(
    source: str | Path,
    target: str | Path,
    config: QConfig,
    reader: DataReader | None = None,
    *,
    verify: bool = True,
    feeds: FeedsSource | None = None,
    overwrite: bool | None = None,
    progress: Progress = _silent,
) -> Outcome:
    """Rotate a float model as its configuration says, and quantize it.

    Args:
        source: The .onnx file: float, rotated or not.
        target: The .onnx file to write; the source's companion files are copied beside it.
        config: What is quantized and how; its algo_config says whether to rotate. Rotations that it leaves open are
            decided by the scheme: R1 and R2 for weights, R4 where activations are quantized, R3 not at all.
        reader: Calibration data; needed for static activation quantization.
        verify: Prove that the rotated model, before it is quantized, computes the same.
        feeds: Inputs to prove it on, for graphs that no rule can feed: an .npz file, a folder of them, or arrays.
        overwrite: Whether existing files may be replaced; None: the target that was named, and what an earlier run to
            it wrote beside it.
        progress: Called as the work goes on.

    Returns:
        What was done.

    Raises:
        InputError: The model, the configuration, the calibration data or the target is at fault.
        VerificationError: The rotated model does not compute the same; nothing is written.
    """
    clock = Clock()
    model = model_io.load(source)
    folder = Path(source).absolute().parent
    model_io.check_target(model, target, overwrite=overwrite)
    refuse_quantized(recorded(model))
    protected = model_io.input_files(model)
    data, given_inputs = (
        None if reader is None else wrap(reader),
        None if feeds is None else given_feeds(feeds, model),
    )
    # Wrong names, old opsets, groups that do not fit and a missing reader are told before any long work.
    selection = select(model, config)
    lowbit.check(selection, config, data)
    static_ranges.require_reader(selection, data)
    rotating = _still_to_rotate(model, config)
    samples = lowbit.calibration_samples(config, data)
    lowbit.check_tokens(model, selection, samples, "" if data is None else data.name)
    with workspace(Path(target), config, protected, samples, data) as work:
        base: str | Path = source
        equivalence: Equivalence | None = None
        kinds = kinds_for(config)
        plan = None if rotating is None else _rotate_in_place(model, rotating, kinds, quantized_inputs(selection))
        # After what is wrong with the configuration, and before anything that takes long.
        model_io.check_target(model, target, overwrite=overwrite, companions_from=folder)
        if plan is not None and rotating is not None:
            clock.lap("plan")
            # Written even where nothing runs it: quantizing reads each weight twice, rotating it twice costs more.
            base = work.scratch / "rotated.onnx"
            # The proof reads from the record which caches are rotated.
            record(model, make_recipe(rotation=(plan, rotating)))
            model_io.save(model, base, progress=_phase(progress, "rotate"))
            clock.lap("rotate")
            if verify:
                equivalence = _prove(source, base, given_inputs, progress)
                clock.lap("verify")
            model = model_io.load(base)
            selection = select(model, config)
        # Of a rotated model that is quantized without any activation `rotation_notes` speaks.
        needless = needless_notes(model, selection) if plan is not None or Kind.R4 in kinds else ()
        ranges = static_ranges.calibrate(
            base, selection, work.reader, max_samples=config.calib_data_size, progress=_phase(progress, "calibrate")
        )
        if ranges:
            clock.lap("calibrate")
        given: GivenWeights | None = None
        notes: tuple[str, ...] = ()
        if work.checkpoint is not None:
            task = lowbit.Task(model, selection, config, ranges, work.samples)
            given, notes = lowbit.round_weights(task, work.checkpoint, work.scratch, _phase(progress, "round"))
            clock.lap("round")
        notes = (*left_in_float(model.graph, config), *notes)
        earlier = recorded(model)
        apply_selection(model, selection, ranges, _phase(progress, "quantize"), given)
        done = (plan, rotating) if plan is not None and rotating is not None else None
        recipe = make_recipe(rotation=done, earlier=earlier, quantization=(config, selection))
        record(model, recipe)
        report = dict(recipe)
        if equivalence is not None:
            report["equivalence"] = equivalence_record(equivalence)
        saved = model_io.save(
            model,
            target,
            overwrite=overwrite,
            use_external_data=config.use_external_data_format or None,
            progress=_phase(progress, "save"),
            companions_from=folder,
            report=report,
            forbid=protected,
        )
        clock.lap("quantize")
    of_rotation = plan.notes if plan is not None else rotation_notes(earlier, kinds)
    of_reader = () if data is None else data.notes(config.calib_data_size)
    notes = (*config.notes, *of_rotation, *needless, *notes, *of_reader)
    return Outcome(saved, recipe, equivalence, notes, clock.laps, None if data is None else data.bos)


def _still_to_rotate(model: ir.Model, config: QConfig) -> QuarotConfig | None:
    """The rotation that is left to do: none where the model brings what the configuration asks for.

    Raises:
        ConfigError: The model was rotated in another way than the configuration says.
    """
    earlier = recorded(model)
    if config.quarot is None or earlier is None or not is_rotated(earlier):
        return config.quarot
    refuse_other_rotation(earlier, config.quarot)
    return None


def _rotate_in_place(
    model: ir.Model, config: QuarotConfig, default: frozenset[Kind], quantized: frozenset[ir.Node] | None = None
) -> Plan:
    """Find the sites, plan, edit the graph; weights follow when the model is written."""
    earlier = recorded(model)
    if earlier is not None and is_rotated(earlier):
        raise ModelError(
            f"the model is already rotated ({summary(earlier)}); start from the original, or quantize this one without "
            "rotation (no QuarotConfig in algo_config)"
        )
    sites, request, notes = sites_and_request(model, config, default, quantized)
    if not sites.layers and not sites.online_pairs:
        raise ModelError(
            "the graph is not a decoder (no attention with a residual stream was found) and no online_pairs are named: "
            "there is nothing to rotate; name nodes in a rotation config's online_pairs, or go without rotation"
            f"{weights_with_default(model.graph)}"
        )
    plan = plan_rotation(sites, request)
    plan = replace(plan, notes=(*notes, *plan.notes))
    if not plan.edits:
        why = f": {plan.notes[0]}" if plan.notes else "; switch on at least one of R1 to R4"
        raise ConfigError(f"no rotation is left to do{why}")
    apply_plan(model, plan)
    return plan


def _prove(source: str | Path, rotated: Path, feeds: Sequence[Feeds] | None, progress: Progress) -> Equivalence:
    """Compare the two; raises VerificationError when they differ."""
    progress("verify", 0, None)
    try:
        equivalence = compare(source, rotated, feeds=feeds)
    except FeedError as error:
        what = "give other inputs" if feeds is not None else "give inputs for the proof"
        raise FeedError(
            error.reason, f"{what} (--feeds FILE.npz, feeds=), or go without it (--no-verify, verify=False)"
        ) from error
    require(equivalence)
    progress("verify", 1, 1)
    return equivalence


def _phase(progress: Progress, name: str) -> Callable[[int, int | None], None]:
    """Progress of one phase."""
    return lambda done, total: progress(name, done, total)
