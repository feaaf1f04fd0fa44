"""The way of a model through the house: load, find the sites, rotate, prove, calibrate, quantize, save.

``rotate`` and ``quantize`` read like these lines. Both leave the input as it is and write the output whole or not
at all. Where the rotated float model is needed as a file (to prove it, to calibrate on it), it is written to a
scratch folder beside the output, which is removed again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from quarot_onnx import model_io
from quarot_onnx.calibration.readers import DataReader
from quarot_onnx.errors import ConfigError, ModelError
from quarot_onnx.evaluation.check import Check, CheckRun, prepare
from quarot_onnx.evaluation.equivalence import Equivalence, compare, require
from quarot_onnx.evaluation.fidelity import Fidelity
from quarot_onnx.evaluation.report import equivalence_record
from quarot_onnx.intent import kinds_for, sites_and_request
from quarot_onnx.model_io import SavedModel
from quarot_onnx.processor import EXACT_PRODUCTS
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
from quarot_onnx.quantization.select import saturable, select
from quarot_onnx.rotation.apply import apply_plan
from quarot_onnx.rotation.plan import Plan, plan_rotation
from quarot_onnx.sites.model import Kind
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
        fidelity: How near the quantized model comes to the original; None where nothing was quantized or checked.
        notes: What the user should know.
        seconds: Time of each phase.
    """

    saved: SavedModel
    recipe: Recipe
    equivalence: Equivalence | None
    fidelity: Fidelity | None
    notes: tuple[str, ...]
    seconds: Mapping[str, float]


def rotate(
    source: str | Path,
    target: str | Path,
    config: QuarotConfig,
    *,
    verify: bool = True,
    overwrite: bool = True,
    progress: Progress = _silent,
) -> Outcome:
    """Rotate a float model.

    R1, R2 and R4 are done where the model allows it, R3 when it is asked for.

    Args:
        source: The .onnx file.
        target: The .onnx file to write; the source's companion files are copied beside it.
        config: Which rotations.
        verify: Prove that the rotated model computes the same.
        overwrite: Whether an existing target may be replaced.
        progress: Called as the work goes on.

    Returns:
        What was done.

    Raises:
        InputError: The model, the configuration or the target is at fault.
        VerificationError: The rotated model does not compute the same; nothing is written.
    """
    clock = Clock()
    model = model_io.load(source)
    model_io.check_target(model, target, overwrite=overwrite)
    refuse_quantized(recorded(model))
    plan = _rotate_in_place(model, config, frozenset({Kind.R1, Kind.R2, Kind.R4}))
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
            equivalence = _prove(source, file, progress)
            clock.lap("verify")
            report["equivalence"] = equivalence_record(equivalence)
            # What is written is what was proved.
            model = model_io.load(file)
        saved = model_io.save(
            model,
            target,
            overwrite=overwrite,
            progress=_phase(progress, "save"),
            companions_from=Path(source).absolute().parent,
            report=report,
            forbid=protected,
        )
        clock.lap("save")
    return Outcome(saved, recipe, equivalence, None, (*config.notes, *plan.notes), clock.laps)


def quantize(
    source: str | Path,
    target: str | Path,
    config: QConfig,
    reader: DataReader | None = None,
    *,
    verify: bool = True,
    check: Check | None = Check(),  # noqa: B008 - frozen
    overwrite: bool = True,
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
        check: Compare the quantized model with the original, as onnxruntime runs the two here; None goes without.
        overwrite: Whether an existing target may be replaced.
        progress: Called as the work goes on.

    Returns:
        What was done.

    Raises:
        InputError: The model, the configuration, the calibration data or the target is at fault.
        VerificationError: The rotated model does not compute the same, or the quantized one breaks a limit of the
            check; nothing is written.
    """
    clock = Clock()
    model = model_io.load(source)
    model_io.check_target(model, target, overwrite=overwrite)
    refuse_quantized(recorded(model))
    protected = model_io.input_files(model)
    # Wrong names, old opsets, groups that do not fit and a missing reader are told before any long work.
    selection = select(model, config)
    lowbit.check(selection, config, reader)
    static_ranges.require_reader(selection, reader)
    rotating = _still_to_rotate(model, config)
    checking = prepare(check, source, model, reader)
    samples = lowbit.calibration_samples(config, reader)
    lowbit.check_tokens(model, selection, samples)
    with workspace(Path(target), config, protected, samples, reader) as work:
        base: str | Path = source
        plan: Plan | None = None
        equivalence: Equivalence | None = None
        if rotating is not None:
            plan = _rotate_in_place(model, rotating, kinds_for(config))
            clock.lap("plan")
            # Written even where nothing runs it: quantizing reads each weight twice, rotating it twice costs more.
            base = work.scratch / "rotated.onnx"
            model_io.save(model, base, progress=_phase(progress, "rotate"))
            clock.lap("rotate")
            if verify:
                equivalence = _prove(source, base, progress)
                clock.lap("verify")
            model = model_io.load(base)
            selection = select(model, config)
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
            companions_from=Path(source).absolute().parent,
            report=report,
            forbid=protected,
            check=partial(_check, checking, clock, progress),
            session_options={EXACT_PRODUCTS: "1"} if saturable(selection, config) else model_io.NO_OPTIONS,
        )
        clock.lap("save")
    of_rotation = plan.notes if plan is not None else rotation_notes(earlier, kinds_for(config))
    notes = (*config.notes, *of_rotation, *notes, *checking.notes)
    return Outcome(saved, recipe, equivalence, checking.fidelity, notes, clock.laps)


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


def _rotate_in_place(model: ir.Model, config: QuarotConfig, default: frozenset[Kind]) -> Plan:
    """Find the sites, plan, edit the graph; weights follow when the model is written."""
    earlier = recorded(model)
    if earlier is not None and is_rotated(earlier):
        raise ModelError(
            f"the model is already rotated ({summary(earlier)}); start from the original, or quantize this one without "
            "rotation (no QuarotConfig in algo_config)"
        )
    sites, request, notes = sites_and_request(model, config, default)
    if not sites.layers and not sites.online_pairs:
        raise ModelError(
            "the graph is not a decoder (no attention with a residual stream was found) and no online_pairs are named: "
            "there is nothing to rotate; name nodes in a rotation config's online_pairs, or go without rotation"
        )
    plan = plan_rotation(sites, request)
    plan = replace(plan, notes=(*notes, *plan.notes))
    if not plan.edits:
        why = f": {plan.notes[0]}" if plan.notes else "; switch on at least one of R1 to R4"
        raise ConfigError(f"no rotation is left to do{why}")
    apply_plan(model, plan)
    return plan


def _prove(source: str | Path, rotated: Path, progress: Progress) -> Equivalence:
    """Compare the two; raises VerificationError when they differ."""
    progress("verify", 0, None)
    equivalence = compare(source, rotated)
    require(equivalence)
    progress("verify", 1, 1)
    return equivalence


def _check(checking: CheckRun, clock: Clock, progress: Progress, quantized: Path) -> dict[str, object]:
    """Compare the files that will be the output with the original."""
    clock.lap("quantize")
    progress("check", 0, None)
    record = checking.run(quantized)
    progress("check", 1, 1)
    clock.lap("check")
    return record


def _phase(progress: Progress, name: str) -> Callable[[int, int | None], None]:
    """Progress of one phase."""
    return lambda done, total: progress(name, done, total)
