"""What a run needs besides its input and output: a scratch folder, a checkpoint, a clock."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quarot_onnx.calibration.feeds import Feeds
from quarot_onnx.calibration.readers import DataReader, SampleReader
from quarot_onnx.errors import OutputError
from quarot_onnx.quantization import lowbit
from quarot_onnx.quantization.checkpoint import Checkpoint, open_checkpoint
from quarot_onnx.quantization.config import QConfig
from quarot_onnx.staging import nearest_existing


@dataclass(frozen=True, eq=False)
class Workspace:
    """Where a run keeps what it needs until it ends.

    Attributes:
        scratch: A folder on the output's disk.
        checkpoint: What a killed run goes on from; None where nothing takes long.
        samples: Calibration samples for rounding.
        reader: The calibration data; reads from `samples` where there are any, since a reader may be read only once.
    """

    scratch: Path
    checkpoint: Checkpoint | None
    samples: list[Feeds]
    reader: DataReader | None


@contextmanager
def workspace(
    target: Path, config: QConfig, sources: list[Path], samples: list[Feeds], reader: DataReader | None
) -> Iterator[Workspace]:
    """A scratch folder, or for weights that are rounded beforehand a checkpoint that outlives an interrupted run."""
    if not config.low_bit:
        with scratch_folder(target.absolute().parent) as scratch:
            yield Workspace(scratch, None, [], reader)
        return
    with open_checkpoint(target, lowbit.fingerprint(sources, config, samples)) as checkpoint:
        again = SampleReader(samples) if samples else reader
        yield Workspace(checkpoint.scratch, checkpoint, samples, again)


class Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self.laps[phase] = now - self._last
        self._last = now


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder on the output's disk, removed at the end whatever happens."""
    existing = nearest_existing(folder)
    try:
        path = Path(tempfile.mkdtemp(prefix=".quarot-", dir=existing))
    except OSError as error:
        raise OutputError(f"cannot write to {existing}: {error.strerror}; choose another output folder") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
