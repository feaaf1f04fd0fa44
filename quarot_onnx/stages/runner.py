"""Run a model stage by stage over the calibration samples, as a float model and as the model quantized so far.

Both paths share the inputs and segment 0. From then on the quantized path multiplies by the weights that it was given,
and its stages read inputs that went through the activation's quantization. A stage's inputs are seen once, summed into
statistics and forgotten when nothing needs them any more; what lies between segments is the residual stream and what
else is carried (:mod:`quarot_onnx.stages.blocks`). Samples are run side by side, each on one core.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import onnx_ir as ir
from numpy.typing import NDArray

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.hessian import Accumulator, Statistics
from quarot_onnx.piecewise.states import States
from quarot_onnx.stages.blocks import Segments, Stage
from quarot_onnx.stages.passing import Fake, Floats, Material, Passage, Replacement, Step
from quarot_onnx.threads import spread, thread_count

__all__ = ["FLOAT", "QUANTIZED", "Fake", "Replacement", "Runner", "StageRunner"]

QUANTIZED, FLOAT = "quantized", "float"
"""The two paths, as their files are named."""

_WAVE = 2
"""Samples for each thread before their inputs are summed up: more wait less for the slowest, and take more memory."""


class Runner(Protocol):
    """Takes the samples through a model's stages, in order."""

    def statistics(self, number: int, before: Replacement | None, activation: Fake | None) -> Statistics:
        """Run up to the input of a stage and sum up what comes in.

        Args:
            number: The stage; they are asked for in order, each once.
            before: What the quantized path does at the stage before; None for the first stage.
            activation: What quantization does to this stage's input before it is summed up; None leaves it.

        Raises:
            CalibrationError: A sample does not fit the model, or gives NaN or infinity.
        """

    def save(self, folder: Path) -> None:
        """Write all hidden states, to go on from here in another process."""

    def load(self, folder: Path) -> None:
        """Read what ``save`` of any runner wrote."""


class StageRunner:
    """A runner in this process."""

    def __init__(
        self,
        model: ir.Model,
        stages: Sequence[Stage],
        samples: Sequence[Feeds],
        *,
        follow_float: bool,
        scratch: Path,
        limit: int,
    ) -> None:
        """Label the graph; nothing is run yet.

        Args:
            model: The float model, its large weights external; it is not changed.
            stages: From ``blocks.find_stages``.
            samples: Input name to array, for each sample. What their mask hides is not summed up.
            follow_float: Whether the float path is needed too (for the drift D).
            scratch: A folder for hidden states that do not fit into memory.
            limit: Bytes of hidden states to keep in memory, for both paths together.

        Raises:
            CalibrationError: A sample does not name the model's inputs, or the mask hides all of them.
        """
        self._material = Material.of(model, samples)
        self._segments, self._stages = Segments(model, stages, self._material.fed), stages
        self._writing = Lock()
        share = limit // 2 if follow_float else limit
        self._quantized = States(scratch / QUANTIZED, share)
        self._float = States(scratch / FLOAT, share) if follow_float else None

    def statistics(self, number: int, before: Replacement | None, activation: Fake | None) -> Statistics:
        """See `Runner`."""
        step = Step(number, before, activation, self._float is not None)
        passage = Passage(self._segments, self._stages, step, lambda name: self._quantized[0, name].dtype)
        sums = Accumulator(self._stages[number].linears[0].in_features, drift=self._float is not None)
        samples, ends = self._material.samples, {unit.stop - 1 for unit in self._material.units}

        def run(place: int) -> tuple[Floats, Floats | None]:
            """What comes in on both paths."""
            held = [
                None if states is None else _View(states, place, self._writing)
                for states in (self._quantized, self._float)
            ]
            assert held[0] is not None
            return passage.run(samples[place], held[0], held[1])

        places, wave = range(len(samples)), _WAVE * thread_count()
        for start in places[::wave]:
            now = places[start : start + wave]
            for place, (x, exact) in zip(now, spread(run, now), strict=True):
                sums.add(x, exact)
                if place in ends:
                    sums.end_unit()
        return sums.finish()

    def save(self, folder: Path) -> None:
        """See `Runner`."""
        self._quantized.save(folder / f"{QUANTIZED}.zip")
        if self._float is not None:
            self._float.save(folder / f"{FLOAT}.zip")

    def load(self, folder: Path) -> None:
        """See `Runner`."""
        for path in saved(folder, QUANTIZED):
            self._quantized.load(path)
        for path in [] if self._float is None else saved(folder, FLOAT):
            assert self._float is not None
            self._float.load(path)


def saved(folder: Path, path: str) -> list[Path]:
    """The archives of hidden states of a path that a runner saved.

    Raises:
        FileNotFoundError: There are none.
    """
    found = sorted(folder.glob(f"{path}*.zip"))
    if not found:
        raise FileNotFoundError(f"no hidden states of the {path} path in {folder}")
    return found


@dataclass(frozen=True, eq=False)
class _View:
    """What is held of one sample; other samples may be on their way in other threads."""

    states: States
    sample: int
    writing: Lock

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.states[self.sample, name]

    def update(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        with self.writing:
            for name, array in arrays.items():
                self.states[self.sample, name] = array

    def discard(self, names: Iterable[str]) -> None:
        with self.writing:
            for name in names:
                self.states.discard((self.sample, name))
