"""Tasks that workers of a cluster can import."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from stage_runs import decoder_stages

from quarot_onnx.evaluation.rows import Found, Rows, find_group
from quarot_onnx.graph.query import seen
from quarot_onnx.io import model_io
from quarot_onnx.stages import unit
from quarot_onnx.stages.unit import UnitSums, UnitTask


@dataclass(frozen=True)
class Item:
    """A number, and where to leave a mark; the first worker that meets a fatal one is killed."""

    number: int
    folder: Path
    fatal: bool = False


def square(item: Item) -> int:
    """Slowest first, so that results are ready in another order."""
    if item.fatal:
        _die_once(item.folder)
    time.sleep(0.05 if item.number == 0 else 0)
    return item.number**2


def always_fatal(_item: Item) -> None:
    """Kills every worker."""
    os.kill(os.getpid(), signal.SIGKILL)


def slow(item: Item) -> int:
    """Takes too long."""
    time.sleep(30)
    return item.number


def take_unit_or_die(task: UnitTask) -> UnitSums:
    """The real task; in stage 5 unit 1 kills its first worker when all is written, and nothing returned."""
    found = unit.take_unit(task)
    if (task.step.number, task.unit) == (5, 1):
        _die_once(task.plan.folder.parents[2])  # beside the output's folder, which is not there yet
    return found


def find_or_die(folder: Path, asked: Rows) -> list[Found]:
    """The real task; the first worker is killed when all is found, and nothing returned."""
    found = find_group(asked)
    _die_once(folder)
    return found


def coarse_weights(source: Path, number: int) -> tuple[NDArray[np.float32], ...]:
    """Weights of a stage on a grid of some 4 bits."""
    stage = decoder_stages(model_io.load(source))[number]
    read = [seen(linear.weight, linear.alpha) for linear in stage.linears]
    return tuple((np.round(w * 24) / 24).astype(np.float32) for w in read)


def given(weights: tuple[NDArray[np.float32], ...]) -> tuple[NDArray[np.float32], ...]:
    """The weights themselves."""
    return weights


def _die_once(folder: Path) -> None:
    try:
        (folder / "killed").touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
