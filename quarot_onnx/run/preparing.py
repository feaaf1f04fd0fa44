"""The float model made ready to be quantized: rotated, smoothed, balanced, given a prefix, written, and proved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import onnx_ir as ir

from quarot_onnx.calibration.changed import ChangedReader
from quarot_onnx.calibration.feeds import Feeds, ModelInputs
from quarot_onnx.calibration.leading import Lead, led_samples, texts_of
from quarot_onnx.calibration.readers import DataReader, SampleReader, wrap
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import (
    AlgoConfig,
    KVCacheConfig,
    QuarotConfig,
    SinkPrefixConfig,
    SmoothQuantConfig,
)
from quarot_onnx.distributed.cluster import Cluster
from quarot_onnx.evaluation.check import CheckRun
from quarot_onnx.evaluation.equivalence import Equivalence
from quarot_onnx.io import model_io
from quarot_onnx.kvcache.plan import plan_cache
from quarot_onnx.piecewise.memory import Memory
from quarot_onnx.progress import PhaseProgress, of_phase
from quarot_onnx.quantization.select import Selection, select
from quarot_onnx.rotation.pasts import past_change
from quarot_onnx.rotation.plan import Plan
from quarot_onnx.run.balancing import balance_in_place
from quarot_onnx.run.prefixing import find_prefix, put_prefix, with_prefix
from quarot_onnx.run.provenance import make_recipe, record, recorded
from quarot_onnx.run.smoothing import smooth_in_place
from quarot_onnx.run.turning import prove
from quarot_onnx.run.workspace import Clock, Workspace
from quarot_onnx.sites.detect import Survey


@dataclass(frozen=True, eq=False)
class Run:
    """What the steps of a run share.

    Attributes:
        source: The original's file.
        config: What is asked for.
        work: The scratch folder, the checkpoint, the calibration data.
        checking: The check of the quantized model.
        feeds: Inputs of the proof, as the original takes them; None for those that a rule makes.
        verify: Whether the changed float model is compared with the original.
        clock: Seconds of each phase.
        progress: Called as the work goes on.
        memory: How models are run.
        cluster: Workers that help; None where all is done here.
    """

    source: str | Path
    config: QConfig
    work: Workspace
    checking: CheckRun
    feeds: Sequence[Feeds] | None
    verify: bool
    clock: Clock
    progress: PhaseProgress
    memory: Memory
    cluster: Cluster | None = None

    @property
    def folder(self) -> Path:
        """Where the original and its config files lie."""
        return Path(self.source).absolute().parent


@dataclass(frozen=True, eq=False)
class Start:
    """What is quantized.

    Attributes:
        file: The float model's file, rotated and smoothed where it is to be.
        selection: What of it is quantized; the same model, loaded.
        reader: The calibration data, as this model takes them.
        samples: The same for algorithms, which look at them more than once.
        limit: How many of them count; None for all.
        feeds: Inputs of the proof, as this model takes them; None for those that a rule makes.
        lead: What the model has before the tokens that it is fed; None for nothing.
        equivalence: The proof that nothing else changed.
        notes: What the user should know of how it was made.
    """

    file: str | Path
    selection: Selection
    reader: DataReader | None
    samples: list[Feeds]
    limit: int | None
    feeds: Sequence[Feeds] | None = None
    lead: Lead | None = None
    equivalence: Equivalence | None = None
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> ir.Model:
        """The model."""
        return self.selection.survey.model


def prepared(
    start: Start, rotation: tuple[Plan, QuarotConfig] | None, run: Run, asked: SinkPrefixConfig | None
) -> Start:
    """Every step that the configuration asks for, the rotation first; the last one is proved, and with it all.

    A prefix is decided on after the rotation, and put in last: what is measured in between, is measured behind it.

    Args:
        start: The original, its graph rotated already where it is to be.
        rotation: What was done to the graph, and what was asked for.
        run: What the steps share.
        asked: The prefix that is asked for, where the model can have one.
    """
    asking = [item for item in run.config.algo_config if item.needs_statistics]
    steps = [(item, *_STEPS[type(item)]) for item in asking if type(item) in _STEPS]
    if rotation is not None:
        run.clock.lap("plan")
        # The proof reads from the record which caches are rotated.
        record(start.model, make_recipe(rotation=rotation))
        if run.verify or start.reader is not None or asked is not None or steps:
            start = _written(start, rotation[0], run, "rotate")
        else:  # Nothing runs it: weights are rotated on their way into the output.
            start = _changed(start, rotation[0], run)
            run.clock.lap("rotate")
    prefix: SinkPrefixConfig | None = None
    if asked is not None:
        progress = of_phase(run.progress, "prefix")
        prefix, notes = find_prefix(asked, start.file, start.selection, start.samples, progress, memory=run.memory)
        start = replace(start, notes=(*start.notes, *notes))
        run.clock.lap("prefix")
    for config, phase, step in steps:
        plan = step(start if prefix is None else _behind(start, prefix, run), config, run)
        record(start.model, make_recipe(earlier=recorded(start.model), transform=(plan, config)))
        start = _written(start, plan, run, phase)
    if prefix is not None:
        given, done = put_prefix(start.model, start.file, prefix, run.folder, run.memory)
        start = _written(_led(start, given.inputs, given.lead), done, run, "prefix")
    changed = rotation is not None or steps or prefix is not None
    return _proved(start, run) if changed and run.verify else start


def behind_its_prefix(start: Start, folder: Path) -> Start:
    """A model as it comes: where it holds a prefix already, the calibration data go without what that brings.

    Args:
        start: The model.
        folder: Where it and its config files lie.
    """
    lead = Lead.of(start.model, folder)
    if lead is None or start.reader is None:
        return start
    return _led(start, ModelInputs.from_model(start.model, folder=folder), lead)


def _led(start: Start, inputs: ModelInputs, lead: Lead) -> Start:
    """The same without what a prefix brings in its calibration data."""
    assert start.reader is not None, "refused before"
    given = start.samples or list(islice(wrap(start.reader), start.limit))
    samples = led_samples(inputs, lead, texts_of(start.model, given))
    kept = samples if start.samples else []
    return replace(start, reader=SampleReader(samples), samples=kept, limit=None, lead=lead)


def _smooth(start: Start, config: Any, run: Run) -> Plan:
    """Scales moved from activations into weights."""
    assert start.reader is not None, "refused before"
    progress = of_phase(run.progress, "smooth")
    return smooth_in_place(
        start.file, start.selection, config, start.reader, start.limit, progress=progress, memory=run.memory
    )


def _balance(start: Start, config: Any, run: Run) -> Plan:
    """Keys and queries balanced."""
    assert start.reader is not None, "refused before"
    quarot = run.config.quarot
    return balance_in_place(
        start.file,
        start.selection.survey,
        start.reader,
        run.folder,
        halved=plan_cache(start.selection.survey, config).halved,
        before=0 if start.lead is None else len(start.lead.ids),
        seed=quarot.seed if quarot is not None and quarot.use_random_had else None,
        max_samples=start.limit,
        progress=of_phase(run.progress, "balance"),
        memory=run.memory,
    )


_STEPS: Mapping[type[AlgoConfig], tuple[str, Callable[[Start, Any, Run], Plan]]] = {
    SmoothQuantConfig: ("smooth", _smooth),
    KVCacheConfig: ("balance", _balance),
}
"""What is done to the float model after its rotation: the phase, and the function that edits the graph."""


def _behind(start: Start, prefix: SinkPrefixConfig, run: Run) -> Start:
    """The model that is measured, behind its prefix; the one that is loaded stays as it is, to be edited."""
    model, file = model_io.load(start.file), run.work.scratch / "behind.onnx"
    given = with_prefix(model, start.file, prefix, run.folder, run.memory)
    if given.lead.past is None:
        model_io.save(model, file)
        start = replace(start, file=file)
    return _led(start, given.inputs, given.lead)


def _written(start: Start, plan: Plan, run: Run, phase: str) -> Start:
    file = run.work.scratch / f"{phase}.onnx"
    model_io.save(start.model, file, progress=of_phase(run.progress, phase))
    run.clock.lap(phase)
    return _changed(replace(start, file=file), plan, run, model_io.load(file))


def _changed(start: Start, plan: Plan, run: Run, model: ir.Model | None = None) -> Start:
    """The same after a plan was carried out: what of the model, or of it loaded anew, is quantized."""
    selection = select(Survey(start.model if model is None else model), run.config)
    return _own_pasts(replace(start, selection=selection, notes=(*start.notes, *plan.notes)), plan)


def _own_pasts(start: Start, plan: Plan) -> Start:
    """The same, the pasts in its data and feeds as the model makes them now that the plan was carried out."""
    change = past_change(plan, start.model)
    if change is None:
        return start
    samples = [change(feeds) for feeds in start.samples]
    reader = start.reader
    if reader is not None:
        reader = SampleReader(samples) if samples else ChangedReader(wrap(reader), change)
    feeds = None if start.feeds is None else [change(feed) for feed in start.feeds]
    return replace(start, reader=reader, samples=samples, feeds=feeds)


def _proved(start: Start, run: Run) -> Start:
    equivalence = prove(
        run.source,
        start.file,
        run.feeds,
        run.progress,
        own_feeds=start.feeds,
        then=run.checking.observe,
        lead=start.lead,
        memory=run.memory,
        model=start.model,
    )
    run.clock.lap("verify")
    return replace(start, equivalence=equivalence)
