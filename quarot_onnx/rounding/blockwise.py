"""Round weights block by block: each Linear sees the inputs that the blocks quantized before it produce.

Inside a block the order is that of the graph, which is q, k, v; o; gate, up; down ("true sequential" in GPTQ's code).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.hessian import Statistics
from quarot_onnx.config.rounding import HessianConfig, RoundingConfig
from quarot_onnx.distributed.cluster import Cluster
from quarot_onnx.graph.linear import Linear
from quarot_onnx.graph.query import Constant, seen
from quarot_onnx.piecewise.memory import Memory, give_back
from quarot_onnx.progress import Progress
from quarot_onnx.quantization.activations import Activation, round_trip
from quarot_onnx.quantization.scheme import QuantizedWeight, WeightScheme
from quarot_onnx.rounding.checkpoint import DAMAGE, Checkpoint, notes_of
from quarot_onnx.rounding.elsewhere import Workers
from quarot_onnx.rounding.methods import round_weight
from quarot_onnx.rounding.solve import Helpers
from quarot_onnx.rounding.store import RoundedWeight
from quarot_onnx.rounding.token_notes import token_notes, told
from quarot_onnx.stages.blocks import Stage, find_stages
from quarot_onnx.stages.runner import Fake, Replacement, Runner, StageRunner
from quarot_onnx.stages.spread import SpreadRunner
from quarot_onnx.threads import one_blas_thread

_STACKED = 1 << 26
"""Elements of the Linears of a stage that are rounded together."""


@dataclass(frozen=True, eq=False)
class WeightJob:
    """A weight to round.

    Attributes:
        name: Its node's name.
        weight: The constant, seen as [in, out].
        alpha: A factor that belongs to it.
        scheme: Its family of grids.
        linear: Its Linear; None for a table.
        activation: What the finished model does to the Linear's input.
    """

    name: str
    weight: Constant
    scheme: WeightScheme
    alpha: float = 1.0
    linear: Linear | None = None
    activation: Activation = None

    def read(self, *, own: bool = True) -> NDArray[np.floating]:
        """W: [in, out]; ``own`` is False where nothing is written into it."""
        return seen(self.weight, self.alpha, own=own)


@dataclass(eq=False)
class Rounding:
    """How weights are rounded, and what came of it.

    Attributes:
        method: The method and its settings.
        checkpoint: Where results go.
        progress: Called with weights done and their number.
        total: That number.
        rounded: Every job's weight, by its name.
        notes: What the user should know.
    """

    method: RoundingConfig
    checkpoint: Checkpoint
    progress: Progress
    total: int
    rounded: dict[str, RoundedWeight] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def keep(self, job: WeightJob, weight: QuantizedWeight) -> None:
        """Store a job's result."""
        self.found(job, self.checkpoint.store.put(job.name, weight))

    def found(self, job: WeightJob, weight: RoundedWeight) -> None:
        """Count a job's result."""
        self.rounded[job.name] = weight
        self.progress(len(self.rounded), self.total)


@dataclass(frozen=True, eq=False)
class BlockwiseInputs:
    """What rounding block by block works on.

    Attributes:
        model: The float model, its large weights external.
        starts: Nodes of Linears that begin a decoder block.
        samples: Calibration feeds.
        quantize_activations: Whether activations are quantized on the quantized path.
        scratch: A folder for hidden states that do not fit into memory.
        memory: How many of them do.
        file: The model's file.
        cluster: Workers that take the samples through the model and round; None where that is done here.
    """

    model: ir.Model
    starts: Collection[ir.Node]
    samples: Sequence[Feeds]
    quantize_activations: bool
    scratch: Path
    memory: Memory
    file: Path
    cluster: Cluster | None = None

    @property
    def helpers(self) -> Helpers | None:
        """Who may round some columns: the workers."""
        return None if self.cluster is None else Workers(self.cluster, self.scratch)

    def runner(self, stages: Sequence[Stage], *, follow_float: bool) -> Runner:
        """What takes the samples through the stages, here or on the workers."""
        if self.cluster is None:
            limit = self.memory.states
            return StageRunner(
                self.model, stages, self.samples, follow_float=follow_float, scratch=self.scratch, limit=limit
            )
        return SpreadRunner(
            self.cluster,
            self.file,
            self.model,
            stages,
            self.samples,
            follow_float=follow_float,
            scratch=self.scratch,
        )


@one_blas_thread()
def round_blockwise(jobs: Sequence[WeightJob], rounding: Rounding, inputs: BlockwiseInputs) -> None:
    """Round Linears with the statistics of their inputs, in the order of the graph.

    Args:
        jobs: The Linears, in graph order.
        rounding: Takes the results; its checkpoint says where to go on.
        inputs: The model and the calibration samples.

    Raises:
        CalibrationError: NaN in an activation.
        ModelError: A weight holds NaN or infinity.
    """
    by_node = {job.linear.node: job for job in jobs if job.linear is not None}
    stages = find_stages(
        [job.linear for job in jobs if job.linear is not None],
        inputs.starts,
        lambda linear: (linear.transposed_input, by_node[linear.node].activation),
    )
    runner = inputs.runner(stages, follow_float=rounding.method.needs_drift)
    plain = [stage for stage in stages if not stage.routed]
    widest = max(plain, key=lambda stage: stage.linears[0].in_features, default=None)
    first, before = _take_up(stages, runner, rounding, by_node, inputs)
    for number in range(first, len(stages)):
        stage = stages[number]
        members = [by_node[linear.node] for linear in stage.linears]
        fake = _fake(members[0], inputs)
        statistics = runner.statistics(number, before, fake)
        before = None  # it is not needed while weights are rounded, and is large
        if isinstance(rounding.method, HessianConfig):
            found = token_notes(rounding.method, statistics.tokens, stage, widest if number == 0 else None)
            rounding.notes += [note for note in found if not told(note, rounding.notes)]
        _round_stage(members, statistics, rounding, inputs.helpers)
        before = _replacement(members, rounding, fake)
        del statistics
        give_back()
        last = number + 1 == len(stages)
        if last or stages[number + 1].block != stage.block:
            rounding.checkpoint.begin_block(stage.block + 1, rounding.notes, runner.save)


def _take_up(
    stages: Sequence[Stage],
    runner: Runner,
    rounding: Rounding,
    by_node: dict[ir.Node, WeightJob],
    inputs: BlockwiseInputs,
) -> tuple[int, Replacement | None]:
    """The first stage that is left to do, and what the stage before does."""
    state = rounding.checkpoint.last_block()
    if state is None:
        return 0, None
    block, folder = state
    first = next((k for k, stage in enumerate(stages) if stage.block >= block), len(stages))
    done = [by_node[linear.node] for stage in stages[:first] for linear in stage.linears]
    before = None
    try:
        notes = notes_of(folder)
        earlier = [rounding.checkpoint.store.require(job.name, job.scheme, job.weight.shape) for job in done]
        if first < len(stages):
            runner.load(folder)
            last = done[-len(stages[first - 1].linears) :]
            before = _replacement(last, rounding, _fake(done[-1], inputs))
    except DAMAGE:
        rounding.checkpoint.forget_blocks()
        rounding.notes.append(f"what an earlier run kept in {folder.parent} is damaged: all blocks were done anew")
        return 0, None
    rounding.notes.extend(notes)
    for job, weight in zip(done, earlier, strict=True):
        rounding.found(job, weight)
    return first, before


def _fake(job: WeightJob, inputs: BlockwiseInputs) -> Fake | None:
    activation = job.activation
    if activation is None or not inputs.quantize_activations:
        return None
    return partial(round_trip, activation=activation)


def _replacement(jobs: Sequence[WeightJob], rounding: Rounding, fake: Fake | None) -> Replacement:
    """What the quantized path does at a stage that is rounded; it can be sent to other processes."""
    places = tuple((job.name, job.scheme, job.weight.shape) for job in jobs)
    return Replacement(partial(rounding.checkpoint.store.dequantized, places), fake)


def _round_stage(
    jobs: Sequence[WeightJob], statistics: Statistics, rounding: Rounding, helpers: Helpers | None
) -> None:
    """Round the Linears of a stage, those with the same grids together."""
    method = rounding.method
    for scheme, group in groupby(jobs, key=lambda job: job.scheme):
        members = list(group)
        together = scheme.per_channel and sum(int(np.prod(job.weight.shape)) for job in members) <= _STACKED
        for batch in [members] if together else [[job] for job in members]:
            name = " + ".join(job.name for job in batch)
            stacked = batch[0].read() if len(batch) == 1 else np.concatenate([job.read() for job in batch], axis=1)
            result = round_weight(stacked, statistics, scheme, method, name, helpers=helpers)
            if isinstance(method, HessianConfig) and result.damping > method.perc_damp:
                rounding.notes.append(
                    f"the Hessian of {name} could not be factorised with the damping {method.perc_damp:g}: "
                    f"{result.damping:g} was used"
                )
            start = 0
            for job in batch:
                stop = start + job.weight.shape[1]
                rounding.keep(job, _columns(result.weight, start, stop))
                start = stop


def _columns(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Some of a weight's outputs; one scale for all stays what it is."""
    if not weight.scheme.per_channel:
        return weight
    pick = np.s_[:, start:stop]
    return QuantizedWeight(
        weight.scheme,
        np.ascontiguousarray(weight.integers[pick]),
        np.ascontiguousarray(weight.scale[pick]),
        np.ascontiguousarray(weight.zero_point[pick]),
    )
