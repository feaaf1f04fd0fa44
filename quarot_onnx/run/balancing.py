"""The balancing of keys in a run: what is measured, and the edits of the graph."""

from pathlib import Path

from quarot_onnx.calibration.positions import positions_of
from quarot_onnx.calibration.readers import DataReader
from quarot_onnx.kvcache.balance import plan_balance
from quarot_onnx.kvcache.moments import balanceable, collect_moments
from quarot_onnx.piecewise.memory import WHOLE, Memory
from quarot_onnx.progress import Progress
from quarot_onnx.rotation.apply import apply_plan
from quarot_onnx.rotation.edits import Plan
from quarot_onnx.sites.detect import Survey


def balance_in_place(
    file: str | Path,
    survey: Survey,
    reader: DataReader,
    folder: Path,
    *,
    halved: bool = False,
    before: int = 0,
    seed: int | None = None,
    max_samples: int | None = None,
    progress: Progress | None = None,
    memory: Memory = WHOLE,
) -> Plan:
    """Measure queries and keys and edit the graph, after which the survey is out of date.

    Args:
        file: The float model's file.
        survey: The same model, loaded.
        reader: Calibration data.
        folder: Where the original and its config files lie.
        halved: Whether the two halves of a head are rounded on grids of their own.
        before: Positions that a prefix takes.
        seed: Of the random Hadamards; None for plain ones.
        max_samples: Stop after so many samples.
        progress: Called after every sample.
        memory: Whether the model is run piece by piece.

    Raises:
        CalibrationError: The reader is empty, or does not fit.
    """
    found = positions_of(folder, survey.model.graph)
    positions = None if found is None else found.behind(before).count
    attentions, others = balanceable(survey)
    moments = collect_moments(
        file, attentions, reader, positions, max_samples=max_samples, progress=progress, memory=memory
    )
    plan = plan_balance(attentions, others, moments, halved=halved, seed=seed)
    apply_plan(survey.model, plan, survey.shapes)
    return plan
