"""What a run needs besides its input and output: a scratch folder, a checkpoint, a clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.readers import DataReader, SampleReader, wrap
from quarot_onnx.config import QConfig
from quarot_onnx.distributed.cluster import Cluster, connected
from quarot_onnx.io.run_folder import run_folder
from quarot_onnx.rounding import lowbit
from quarot_onnx.rounding.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    import distributed


@dataclass(frozen=True, eq=False)
class Workspace:
    """Where a run keeps what it needs until it ends.

    Attributes:
        scratch: A folder on the output's disk.
        checkpoint: What a killed run goes on from; None where nothing takes long.
        samples: Calibration samples for algorithms.
        reader: The calibration data; reads from `samples` where there are any, since a reader may be read only once.
        decode_steps: Decode steps that follow each sample where ranges are taken; None for the default.
    """

    scratch: Path
    checkpoint: Checkpoint | None
    samples: list[Feeds]
    reader: DataReader | None
    decode_steps: int | None


@contextmanager
def workspace(
    target: Path, config: QConfig, sources: list[Path], samples: list[Feeds], reader: DataReader | None
) -> Iterator[Workspace]:
    """A scratch folder, or for weights that are rounded beforehand a checkpoint that outlives an interrupted run."""
    again = SampleReader(samples) if samples else reader
    steps = 0 if reader is None else wrap(reader).decode_steps
    if not config.low_bit:
        with scratch_folder(target) as scratch:
            yield Workspace(scratch, None, samples, again, steps)
        return
    with (
        run_folder(target) as folder,
        open_checkpoint(folder.path, lowbit.fingerprint(sources, config, samples, steps)) as checkpoint,
    ):
        yield Workspace(folder.scratch, checkpoint, samples, again, steps)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A scratch folder on the output's disk, removed at the end whatever happens.

    An end without error also removes what an interrupted run to the same output kept: the output is there now.

    Args:
        target: The .onnx file that will be written.
    """
    with run_folder(target) as folder:
        yield folder.scratch
        folder.clear()


@contextmanager
def workers_of(
    scheduler: "str | distributed.Client | None", sources: list[Path], work: Workspace, *, needed: bool
) -> Iterator[Cluster | None]:
    """The workers that help a run; None where all is done here.

    Args:
        scheduler: Its address, or a client of it; None for none.
        sources: The model's files.
        work: What the run needs besides; they share its scratch folder.
        needed: Whether there is anything that they can help with.

    Raises:
        QuarotError: See ``connected`` and ``Cluster.check``.
    """
    with connected(scheduler) as cluster:
        if cluster is None:
            yield None
        elif not needed:
            cluster.notes = (*cluster.notes, "nothing is calibrated that workers can help with: --scheduler not used")
            yield cluster
        else:
            cluster.check(sources, work.scratch)
            yield cluster


class Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self.laps[phase] = self.laps.get(phase, 0.0) + now - self._last
        self._last = now
