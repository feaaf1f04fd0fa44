"""The way of a model through the house: load, find the sites, rotate, prove, calibrate, quantize, save.

``rotate`` and ``quantize`` read like these lines. Both leave the input as it is and write the output whole or not
at all. ``rotate`` proves the files that it then moves to their places. Where ``quantize`` needs the rotated float
model as a file (to prove it, to calibrate on it), that is written to a scratch folder beside the output, which is
removed again.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quarot_onnx.calibration.given import FeedsSource, given_feeds
from quarot_onnx.calibration.readers import DataReader, wrap
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import QuarotConfig, SinkPrefixConfig
from quarot_onnx.evaluation.check import Check, prepare
from quarot_onnx.evaluation.equivalence import Equivalence
from quarot_onnx.evaluation.report import equivalence_record
from quarot_onnx.io import model_io
from quarot_onnx.io.companions import GenaiSettings
from quarot_onnx.io.lengths import checked_lengths
from quarot_onnx.kvcache.plan import check_cache
from quarot_onnx.piecewise.memory import QUANTIZING, Memory, give_back
from quarot_onnx.piecewise.panels import light
from quarot_onnx.processor import EXACT_PRODUCTS
from quarot_onnx.progress import PhaseProgress, of_phase, silent
from quarot_onnx.quantization import static_ranges
from quarot_onnx.quantization.select import Selection, saturable, select
from quarot_onnx.rotation.pasts import past_change
from quarot_onnx.rounding import lowbit
from quarot_onnx.run.caching import check_scales
from quarot_onnx.run.finishing import complete
from quarot_onnx.run.hosting import hosting_notes, refuse_lost, search_settings
from quarot_onnx.run.integers import helped, put_integers
from quarot_onnx.run.intent import kinds_for, needless_notes
from quarot_onnx.run.outcome import Outcome
from quarot_onnx.run.prefix_checks import check_given, check_prefix
from quarot_onnx.run.prefixing import held_positions, prefix_files, put_prefix
from quarot_onnx.run.preparing import Run, Start, behind_its_prefix, prepared
from quarot_onnx.run.provenance import RECIPE_KEY, make_recipe, record, recorded, refuse_quantized, rotation_notes
from quarot_onnx.run.turning import prove, rotate_in_place, still_to_rotate, turn
from quarot_onnx.run.workspace import Clock, scratch_folder, workers_of, workspace
from quarot_onnx.sessions import providers
from quarot_onnx.sites.detect import Survey
from quarot_onnx.sites.model import Kind

if TYPE_CHECKING:
    import distributed

__all__ = ["RECIPE_KEY", "Outcome", "quantize", "recorded", "rotate"]


def rotate(
    source: str | Path,
    target: str | Path,
    config: QuarotConfig,
    *,
    verify: bool = True,
    feeds: FeedsSource | None = None,
    prefix: SinkPrefixConfig | None = None,
    overwrite: bool | None = None,
    memory: Memory = Memory(),  # noqa: B008 - frozen
    progress: PhaseProgress = silent,
) -> Outcome:
    """Rotate a float model.

    R1, R2 and R4 are done where the model allows it, R3 when it is asked for.

    Args:
        source: The .onnx file.
        target: The .onnx file to write; the source's companion files are copied beside it.
        config: Which rotations.
        verify: Prove that the rotated model computes the same.
        feeds: Inputs to prove it on, for graphs that no rule can feed: an .npz file, a folder of them, or arrays.
        prefix: The tokens that the rotated graph holds the keys and values of; none are looked for.
        overwrite: Whether existing files may be replaced; None: the target that was named, and what an earlier run to
            it wrote beside it.
        memory: What the run may take, and whether models are run piece by piece for that.
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
    if prefix is not None:
        check_given(prefix, model, folder, given)
    plan = rotate_in_place(Survey(model), config, frozenset({Kind.R1, Kind.R2, Kind.R4}))
    model_io.check_target(model, target, overwrite=overwrite, companions_from=folder)
    recipe = make_recipe(rotation=(plan, config))
    record(model, recipe)
    protected = model_io.input_files(model)
    of_memory = memory.notes(model, light=light(model))
    clock.lap("plan")
    equivalence: Equivalence | None = None

    def proved(written: Path) -> dict[str, object]:
        """What is moved to its place is what is proved."""
        nonlocal equivalence
        clock.lap("rotate" if prefix is None else "save")
        rotated = model_io.load(written)
        change = past_change(plan, rotated)
        own = None if given is None or change is None else [change(feed) for feed in given]
        equivalence = prove(source, written, given, progress, own_feeds=own, memory=memory, model=rotated)
        clock.lap("verify")
        return {"equivalence": equivalence_record(equivalence)}

    with scratch_folder(Path(target)) as scratch:
        if prefix is not None:
            file = scratch / "rotated.onnx"  # which gives the prefix its keys and values
            model_io.save(model, file, progress=of_phase(progress, "rotate"))
            clock.lap("rotate")
            model = model_io.load(file)
            _, done = put_prefix(model, file, prefix, folder)
            recipe = dict(recorded(model) or {})
            plan = replace(plan, notes=(*plan.notes, *done.notes))
            clock.lap("prefix")
        saved = model_io.save(
            model,
            target,
            overwrite=overwrite,
            progress=of_phase(progress, "rotate" if prefix is None else "save"),
            companions_from=folder,
            report=recipe,
            forbid=protected,
            check=proved if verify else None,
        )
        clock.lap("save" if verify or prefix is not None else "rotate")
    return Outcome(saved, recipe, equivalence, None, (*config.notes, *plan.notes, *of_memory), clock.laps)


def quantize(
    source: str | Path,
    target: str | Path,
    config: QConfig,
    reader: DataReader | None = None,
    *,
    selection: Selection | None = None,
    verify: bool = True,
    feeds: FeedsSource | None = None,
    check: Check | None = Check(),  # noqa: B008 - frozen
    fix_shapes: Mapping[str, int] | None = None,
    overwrite: bool | None = None,
    memory: Memory = Memory(),  # noqa: B008 - frozen
    scheduler: "str | distributed.Client | None" = None,
    progress: PhaseProgress = silent,
) -> Outcome:
    """Rotate a float model as its configuration says, and quantize it.

    Args:
        source: The .onnx file: float, rotated or not.
        target: The .onnx file to write; the source's companion files are copied beside it.
        config: What is quantized and how; its algo_config says whether to rotate. Rotations that it leaves open are
            decided by the scheme: R1 and R2 for weights, R4 where activations are quantized, R3 where keys are.
        reader: Calibration data; needed for static activation quantization.
        selection: What ``config`` quantizes of the source, from a caller who has loaded and looked at it already; its
            graph is changed.
        verify: Prove that the rotated model, before it is quantized, computes the same.
        feeds: Inputs to prove it on, for graphs that no rule can feed: an .npz file, a folder of them, or arrays.
        check: Compare the quantized model with the original, as onnxruntime runs the two here; None goes without.
        fix_shapes: Free lengths of the graph that the output fixes, by name; they are fixed last, so that the output
            is checked as it was.
        overwrite: Whether existing files may be replaced; None: the target that was named, and what an earlier run to
            it wrote beside it.
        memory: What the run may take, and whether models are run piece by piece for that.
        scheduler: A Dask scheduler's address, or a client of it: its workers take calibration samples through the model
            (static ranges; GPTQ, GPTAQ and Qronos), with the same result. Model and target lie on storage that they
            share.
        progress: Called as the work goes on.

    Returns:
        What was done.

    Raises:
        InputError: The model, the configuration, the calibration data or the target is at fault.
        VerificationError: The rotated model does not compute the same, or the quantized one breaks a limit of the
            check; nothing is written.
    """
    clock = Clock()
    model = model_io.load(source) if selection is None else selection.survey.model
    folder = Path(source).absolute().parent
    model_io.check_target(model, target, overwrite=overwrite)
    refuse_quantized(recorded(model))
    protected, of_memory = model_io.input_files(model), memory.notes(model, QUANTIZING, light(model))
    data = None if reader is None else wrap(reader)
    given_inputs = None if feeds is None else given_feeds(feeds, model)
    lengths = checked_lengths(model, fix_shapes or {})
    # Wrong names, old opsets, groups that do not fit and a missing reader are told before any long work.
    if selection is None:
        selection = select(Survey(model), config)
    lowbit.check(selection, config, data)
    static_ranges.require_reader(selection, data)
    of_cache = check_cache(selection.survey, config, data)
    no_prefix = check_prefix(config, selection, source, given_inputs, lengths, reader=reader)
    refuse_lost(of_cache, prefixed=config.prefix is not None and no_prefix is None)
    rotating = still_to_rotate(model, config)
    checking = prepare(check, source, model, reader, held_positions(config, model), memory=memory)
    twice = of_cache is not None and of_cache.calibrated and static_ranges.needs_calibration(selection)
    samples = lowbit.calibration_samples(config, data, again=bool(twice))
    lowbit.check_samples(selection, config, samples, "" if data is None else data.name)
    give_back()  # what reading and tokenizing texts took
    with (
        checking,
        workspace(Path(target), config, protected, samples, data) as work,
        workers_of(scheduler, protected, work, needed=helped(selection, config)) as cluster,
    ):
        run = Run(source, config, work, checking, given_inputs, verify, clock, progress, memory, cluster)
        kinds = kinds_for(config)
        rotation, unrotated = (None, ()) if rotating is None else turn(selection, config, rotating)
        # What must not be replaced is told after what is wrong with the configuration, before anything that takes long.
        exact = {EXACT_PRODUCTS: "1"} if saturable(selection, config) else {}
        genai = GenaiSettings(exact, search_settings(of_cache, folder))
        model_io.check_target(model, target, overwrite=overwrite, companions_from=folder, genai=genai)
        check_scales(of_cache, model, rotation)
        begin = Start(source, selection, work.reader, work.samples, config.calib_data_size, given_inputs)
        begin = behind_its_prefix(begin, folder)
        start = prepared(begin, rotation, run, config.prefix if no_prefix is None else None)
        earlier = recorded(start.model)
        # Of a rotated model that is quantized without any activation `rotation_notes` speaks.
        needless = needless_notes(start.selection) if rotation is not None or Kind.R4 in kinds else ()
        notes, cached = put_integers(start, run, target)
        recipe = make_recipe(earlier=earlier, quantization=(config, start.selection))
        record(start.model, recipe)
        proof = {} if start.equivalence is None else {"equivalence": equivalence_record(start.equivalence)}
        saved = model_io.save(
            start.model,
            target,
            overwrite=overwrite,
            use_external_data=config.use_external_data_format or None,
            progress=of_phase(progress, "save"),
            companions_from=folder,
            report={**recipe, **cached.record, **({} if data is None else data.record), **proof, **providers.record()},
            forbid=protected,
            check=partial(complete, run, start, lengths),
            beside={**prefix_files(start.lead), **cached.beside},
            genai=genai,
        )
        clock.lap("save")
    of_rotation = unrotated if rotating is not None else rotation_notes(earlier, kinds)
    of_reader = () if data is None else data.notes(config.calib_data_size)
    notes = (*providers.notes(start.model), *start.notes, *of_rotation, *needless, *notes, *of_reader, *checking.notes)
    notes = (*notes, *hosting_notes(start.model, start.selection, config, folder))
    of_workers = () if cluster is None else cluster.notes
    notes = (*config.notes, *([] if no_prefix is None else [no_prefix]), *notes, *of_memory, *of_workers)
    bos = None if data is None or start.lead is not None else data.bos
    return Outcome(saved, recipe, start.equivalence, checking.fidelity, notes, clock.laps, bos)
