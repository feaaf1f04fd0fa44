"""The float model made ready to be quantized: rotated, smoothed, written to the scratch folder, and proved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.config import QConfig
from quarot_onnx.config.algorithm import AlgoConfig, QuarotConfig, SmoothQuantConfig
from quarot_onnx.evaluation.check import CheckRun
from quarot_onnx.evaluation.equivalence import Equivalence
from quarot_onnx.io import model_io
from quarot_onnx.progress import PhaseProgress, of_phase
from quarot_onnx.quantization.select import Selection, select
from quarot_onnx.rotation.plan import Plan
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
        feeds: Inputs of the proof; None for those that a rule makes.
        verify: Whether the changed float model is compared with the original.
        clock: Seconds of each phase.
        progress: Called as the work goes on.
    """

    source: str | Path
    config: QConfig
    work: Workspace
    checking: CheckRun
    feeds: Sequence[Feeds] | None
    verify: bool
    clock: Clock
    progress: PhaseProgress


@dataclass(frozen=True, eq=False)
class Start:
    """What is quantized.

    Attributes:
        file: The float model's file, rotated and smoothed where it is to be.
        selection: What of it is quantized; the same model, loaded.
        equivalence: The proof that nothing else changed.
        notes: What the user should know of how it was made.
    """

    file: str | Path
    selection: Selection
    equivalence: Equivalence | None = None
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> ir.Model:
        """The model."""
        return self.selection.survey.model


def prepared(start: Start, rotation: tuple[Plan, QuarotConfig] | None, run: Run) -> Start:
    """Every step that the configuration asks for, the rotation first; the last one is proved, and with it all.

    Args:
        start: The original, its graph rotated already where it is to be.
        rotation: What was done to the graph, and what was asked for.
        run: What the steps share.
    """
    steps = [(item, *_STEPS[type(item)]) for item in run.config.algo_config if type(item) in _STEPS]
    if rotation is not None:
        run.clock.lap("plan")
        # The proof reads from the record which caches are rotated.
        record(start.model, make_recipe(rotation=rotation))
        # It is written even where nothing runs it: quantizing reads each weight twice, rotating it twice costs more.
        start = _written(start, rotation[0], run, "rotate", prove_now=not steps)
    for number, (config, phase, step) in enumerate(steps, 1):
        plan = step(start, config, run)
        record(start.model, make_recipe(earlier=recorded(start.model), transform=(plan, config)))
        start = _written(start, plan, run, phase, prove_now=number == len(steps))
    return start


def _smooth(start: Start, config: Any, run: Run) -> Plan:
    """Scales moved from activations into weights."""
    assert run.work.reader is not None, "refused before"
    progress = of_phase(run.progress, "smooth")
    reader, limit = run.work.reader, run.config.calib_data_size
    return smooth_in_place(start.file, start.selection, config, reader, limit, progress=progress)


_STEPS: Mapping[type[AlgoConfig], tuple[str, Callable[[Start, Any, Run], Plan]]] = {
    SmoothQuantConfig: ("smooth", _smooth),
}
"""What is done to the float model after its rotation: the phase, and the function that edits the graph."""


def _written(start: Start, plan: Plan, run: Run, phase: str, *, prove_now: bool) -> Start:
    file = run.work.scratch / f"{phase}.onnx"
    model_io.save(start.model, file, progress=of_phase(run.progress, phase))
    run.clock.lap(phase)
    equivalence: Equivalence | None = None
    if run.verify and prove_now:
        equivalence = prove(run.source, file, run.feeds, run.progress, run.checking.observe)
        run.clock.lap("verify")
    selection = select(Survey(model_io.load(file)), run.config)
    return Start(file, selection, equivalence, (*start.notes, *plan.notes))
